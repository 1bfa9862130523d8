"""memory_report: what weights, gradients and states take, and what 8-bit states save."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from opt8bit.backends import Rule
from opt8bit.optim import every, shards
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.muon_adamw import MuonAdamW8bit
from opt8bit.optim.options import DEFAULTS, Options, check_options
from opt8bit.optim.states import specs, will_be_coded
from opt8bit.optim.table import aligned

if TYPE_CHECKING:
    from typing_extensions import Unpack

Maker = Callable[..., "Optimizer8bit | None"]
Named = Iterable[tuple[str, Tensor]]  # parameters with their names


def _maker(kind: type[Optimizer8bit]) -> tuple[str, Maker]:
    """Returns how an optimizer is made for a report, and what the report calls it."""
    make: Any = kind
    dims = {rule.dim for rule in kind.rules}

    def made(named: Named, **options: Any) -> Optimizer8bit:
        return make([param for _, param in named], **options)

    def made_for_some(named: Named, **options: Unpack[Options]) -> Optimizer8bit | None:
        taken = [param for _, param in named if param.dim() in dims and not param.is_complex()]
        return make(taken, **options) if taken else None

    if kind is MuonAdamW8bit:  # which chooses by names
        return kind.__name__, make
    if None not in dims:
        return f"{kind.__name__}, matrices only", made_for_some
    momentum = inspect.signature(kind).parameters.get("momentum")
    if momentum is not None and momentum.default == 0 and any(not rule.states for rule in kind.rules):
        return f"{kind.__name__}, momentum", partial(made, momentum=0.9)
    return kind.__name__, made


# What a model's report compares, each called with the model's named parameters and the options. Which states there
# are is asked of the optimizer that comes back.
OPTIMIZERS: dict[str, Maker] = dict(map(_maker, every.OPTIMIZERS))
# Options that some optimizers refuse, and that change no state. Of a model's report they are left out.
STATELESS = Options(caution=False, fused=None, capturable=False, offload=False)
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class OptimizerMemory:
    """Counts the bytes under one optimizer, on one process. Counts are of whole parameters, those that get states."""

    optimizer: str
    weight_bytes: int
    gradient_bytes: int  # of the parameters that require a gradient
    state_bytes_32: int  # were every state stored in full
    state_bytes: int  # as the optimizer stores them
    parameters: int
    elements: int
    full_parameters: int  # of these, those whose states are stored in full
    full_elements: int

    @property
    def saved_bytes(self) -> int:
        return self.state_bytes_32 - self.state_bytes

    @property
    def ratio(self) -> float:
        """The bytes of states as stored divided by those of states in full; 1 where there are none."""
        return self.state_bytes / self.state_bytes_32 if self.state_bytes_32 else 1.0


@dataclass(frozen=True)
class MemoryReport:
    """One row for each optimizer; ``print`` shows it as a table."""

    rows: tuple[OptimizerMemory, ...]

    def __str__(self) -> str:
        headings = ("", "weights", "gradients", "32-bit states", "states", "saved", "ratio", "parameters kept in full")
        return aligned(headings, [_cells(row) for row in self.rows])


def memory_report(subject: nn.Module | Optimizer8bit, *, ranks: int = 1, **options: Unpack[Options]) -> MemoryReport:
    """Reports what weights, gradients and optimizer states take, at 32 bits and as this package stores them.

    Only shapes, dtypes and options are looked at, so that a model on the meta device is served as well. States are
    counted from the first step on, ``step`` included, and every parameter that requires a gradient is taken to get
    one. "In full" means float32, or float64 where the parameter is: the states of small tensors, of short rows,
    of biases and of parameters marked ``state_bits = 32``. They and the absmax of each block are why the
    ratio is not a quarter.

    Args:
        subject: an optimizer of this package, reported with its own groups and options; or a model, reported under
            each optimizer of the package, SGD with momentum. Of DTensors the shards on this process are counted.
        ranks: processes that share the parameters as FSDP2 does, along dimension 0: the report is of the first, which
            has most.
        options: for a model, the options that its optimizers get; see :class:`opt8bit.optim.options.Options`. Those
            that not every optimizer has, but that change no state, may be given: ``caution``, ``fused``,
            ``capturable`` and ``offload``.

    Returns:
        A report of one row per optimizer. An optimizer's ``state_bytes`` are the bytes of the tensors in its
        ``state`` once every parameter has been stepped.

    Raises:
        TypeError: ``subject`` is neither; options are given for an optimizer, which has its own; an unknown option
            or a parameter of an unsupported dtype.
        ValueError: the model has no parameter that requires a gradient, an option has a value it cannot have, or
            there are several ranks for parameters that are DTensors already.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks must be a positive integer, got {ranks!r}")
    if isinstance(subject, Optimizer8bit):
        if options:
            raise TypeError(f"an optimizer has its own options; {', '.join(sorted(options))} can be given for a model")
        params = [param for group in subject.param_groups for param in group["params"]]
        return MemoryReport((_memory(type(subject).__name__, subject, params, ranks),))
    if not isinstance(subject, nn.Module):
        kind = f"{type(subject).__module__}.{type(subject).__qualname__}"
        raise TypeError(f"memory_report takes a module or an optimizer of opt8bit, got {kind}")
    params = list(subject.parameters())
    trained = [(name, param) for name, param in subject.named_parameters() if param.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter that requires a gradient: nothing to optimize")
    check_options({**DEFAULTS, **options})
    made = {name: make(trained, **{**options, **STATELESS}) for name, make in OPTIMIZERS.items()}
    return MemoryReport(tuple(_memory(name, optimizer, params, ranks) for name, optimizer in made.items() if optimizer))


def state_bytes(param: Tensor, rule: Rule, group: Mapping[str, Any], coded: bool) -> int:
    """Returns the bytes of the states of a parameter or of a shard, ``step`` included."""
    stored = specs(param, rule, group, coded).values()
    return sum(spec.shape.numel() * spec.dtype.itemsize for spec in stored)


def _memory(name: str, optimizer: Optimizer8bit, params: Sequence[Tensor], ranks: int) -> OptimizerMemory:
    """Returns the row of an optimizer that holds ``params`` or, where some are frozen, those of them that are not."""
    stepped = [(param, group, optimizer.rule(group)) for param, group in _stepped(optimizer)]
    coded = [
        will_be_coded(optimizer.state.get(param, {}), rule, param, group) and (ranks == 1 or param.dim() > 1)
        for param, group, rule in stepped
    ]
    shards_of = {param: _shard(param, ranks) for param in params}
    full = [param.numel() for (param, _, rule), each in zip(stepped, coded, strict=True) if rule.states and not each]
    return OptimizerMemory(
        optimizer=name,
        weight_bytes=sum(_bytes(shards_of[param]) for param in params),
        gradient_bytes=sum(_bytes(shards_of[param]) for param in params if param.requires_grad),
        state_bytes_32=sum(state_bytes(shards_of[param], rule, group, False) for param, group, rule in stepped),
        state_bytes=sum(
            state_bytes(shards_of[param], rule, group, each)
            for (param, group, rule), each in zip(stepped, coded, strict=True)
        ),
        parameters=len(stepped),
        elements=sum(param.numel() for param, _, _ in stepped),
        full_parameters=len(full),
        full_elements=sum(full),
    )


def _stepped(optimizer: Optimizer8bit) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yields the parameters that have states or will get them."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad or optimizer.state.get(param):
                yield param, group


def _shard(param: Tensor, ranks: int) -> Tensor:
    """Returns what a process holds of a parameter: the first of ``ranks``, or this one if it is sharded already.

    Raises:
        ValueError: both are the case.
    """
    if shards.is_sharded(param):
        if ranks > 1:
            raise ValueError(f"parameters are sharded already: leave ranks out, got {ranks}")
        return shards.local(param)
    return param.detach()[: -(-len(param) // ranks)] if param.dim() else param


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cells(row: OptimizerMemory) -> tuple[str, ...]:
    sizes = (row.weight_bytes, row.gradient_bytes, row.state_bytes_32, row.state_bytes, row.saved_bytes)
    kept = f"{row.full_parameters:,} of {row.parameters:,}"
    share = f"{row.full_elements:,} of {row.elements:,} elements"
    return (row.optimizer, *map(readable, sizes), f"{row.ratio:.3f}", f"{kept} ({share})")


def readable(size: float) -> str:
    """Returns a size in the largest unit of which there is at least one: ``1.50 GB``."""
    for unit, scale in UNITS:
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} bytes"
