"""What a block does with its linear layers, determined by watching it run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import linear_layers, matrix
from opt8bit.ptq.experts import expert_families, with_experts
from opt8bit.ptq.states import State, at, copied, hidden_in, is_cache


class ModelError(RuntimeError):
    """An exception that the model's own code has raised."""


class Refused(ValueError):
    """What a model does with its blocks is not what calibration can follow."""


@contextmanager
def raised_by(what: str) -> Iterator[None]:
    """Inside, an exception is one of the model's own code, and is reported as that.

    Raises:
        ModelError: one was raised; its cause is the exception itself.
    """
    try:
        yield
    except (ModelError, Refused):
        raise
    except Exception as error:
        raise ModelError(f"{what} raised {type(error).__name__}: {error}") from error


class Call(NamedTuple):
    """How a model called one of its blocks.

    Attributes:
        hidden: the hidden states, (sequences, length, ...), wherever the model itself has these dimensions.
        args: the other positional arguments.
        kwargs: the other keyword arguments.
        place: position or keyword of the hidden states.
        axes: dimensions of sequences and length in the model's own hidden states.
        name: of the block, for messages.
        state: of the stream that the hidden states are from.
        hands: what the block hands to later ones besides the hidden states: its path in the output, and what stands
            for it in the recorded calls of those.
        later: ids of what later blocks are called with, of all that blocks may change or hand on.
        clones: whether the block overwrites its hidden states.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str = 0
    axes: tuple[int, int] = (0, 1)
    name: str = "block"
    state: State | None = None
    hands: tuple[tuple[tuple[Any, ...], Any], ...] = ()
    later: frozenset[int] = frozenset()
    clones: bool = False

    def of(self, block: nn.Module) -> Tensor:
        """The hidden states that ``block`` makes of this call. It can be run again: what it changes is lost."""
        return self.hidden_of(self.output(block))

    def output(self, block: nn.Module) -> Any:
        """Everything that ``block`` returns, as :meth:`of`."""
        state = self.state or State()
        return self._run(block, copied(state.own((self.args, self.kwargs)), {}))

    def through(self, block: nn.Module) -> Tensor:
        """The hidden states that ``block`` makes, where this is the stream's only pass through it.

        What it changes, or hands on besides the hidden states, is there for the stream's later blocks.
        """
        state = self.state or State()
        output = self._run(block, state.own((self.args, self.kwargs)))
        for path, recorded in self.hands:
            state.hand(recorded, at(output, path))
        state.keep(self.later)
        return self.hidden_of(output)

    def repeatable(self) -> Call:
        """The same call, for :meth:`of` at any later time: the stream's own pass may go through the block meanwhile."""
        return self if self.state is None else self._replace(state=self.state.snapshot())

    def _run(self, block: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = arguments
        hidden = self.hidden if self.axes == (0, 1) else self.hidden.movedim((0, 1), self.axes)
        if self.clones:
            hidden = hidden.clone()
        if isinstance(self.place, str):
            kwargs = {**kwargs, self.place: hidden}
        else:
            args = (*args[: self.place], hidden, *args[self.place :])
        with raised_by(f"the model's block {self.name}"):
            return block(*args, **kwargs)

    def hidden_of(self, output: Any) -> Tensor:
        """The hidden states in what a block has returned."""
        hidden: Tensor = hidden_in(output)
        return hidden if self.axes == (0, 1) else hidden.movedim(self.axes, (0, 1))

    def without_cache(self) -> Call:
        """The same call with nothing to keep keys, values or states of earlier calls in."""
        args = tuple(None if is_cache("", value) else value for value in self.args)
        kwargs = {name: None if is_cache(name, value) else value for name, value in self.kwargs.items()}
        if isinstance(kwargs.get("use_cache"), bool):
            kwargs["use_cache"] = False
        return self._replace(args=args, kwargs=kwargs)


class Anatomy(NamedTuple):
    """What a block does with its linear layers, by name."""

    stages: list[list[str]]  # in the order of their calls; those of a stage read one tensor
    writers: set[str]  # whose output is added to the hidden states as it is, such as o_proj and down_proj
    overwritten: set[str]  # whose output is changed in place afterwards: who keeps it has to copy it
    left: dict[str, str]  # which stay as they are, and why


def anatomy(block: nn.Module, call: Call) -> Anatomy:
    """Runs a block a few times to find out what it does with its linear layers."""
    usage, order = used(block, call)
    tokens = call.hidden.shape[:2].numel()
    families = expert_families(block, usage, tokens)
    experts = {name for family in families for name in family}
    left = {}
    for name, use in usage.items():
        why = use.why_left(tokens)
        if why is not None and name not in experts:
            left[name] = why
    stages = _stages([(name, x) for name, x in order if name not in left])
    return Anatomy(with_experts(stages, families), stream_writers(block, call), overwritten(block, call), left)


class Use(NamedTuple):
    """How a block used a layer in one pass."""

    calls: int = 0
    rows: int = 0  # of its input, all dimensions but the last together
    returns_tensor: bool = True

    def why_left(self, tokens: int) -> str | None:
        """Why a layer that is no expert cannot be rounded on what it sees; None if it can."""
        if not self.calls:
            return "is not called"
        if self.calls > 1:
            return f"is called {self.calls} times"
        if not self.returns_tensor:
            return "returns no tensor"
        if self.rows != tokens:
            return f"sees {self.rows} vectors of {tokens} tokens"
        return None


def used(block: nn.Module, call: Call) -> tuple[dict[str, Use], list[tuple[str, Tensor]]]:
    """How a block uses each of its layers; and which input it calls them with, in the order of the calls."""
    usage = {name: Use() for name in linear_layers(block)}
    order: list[tuple[str, Tensor]] = []

    def see(name: str, x: Any, output: Any) -> None:
        rows = x.numel() // x.shape[-1] if isinstance(x, Tensor) and x.numel() else 0
        had = usage[name]
        fine = isinstance(output, Tensor) and isinstance(x, Tensor) and had.returns_tensor
        usage[name] = Use(had.calls + 1, had.rows + rows, fine)
        order.append((name, x))

    with _watched(linear_layers(block), see):
        call.of(block)
    return usage, order


def _stages(order: list[tuple[str, Tensor]]) -> list[list[str]]:
    """The names in the order of their calls; those that read one tensor go together.

    So queries, keys and values are one stage and share their statistics, and so are the two halves of a gated MLP.
    """
    result: list[list[str]] = []
    last: Tensor | None = None
    for name, x in order:
        if x is not last:
            result.append([])
        result[-1].append(name)
        last = x
    return result


@contextmanager
def _watched(layers: dict[str, nn.Module], see: Callable[[str, Any, Any], object]) -> Iterator[None]:
    """Inside, ``see(name, input, output)`` runs after each of the layers."""

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(name, args[0] if args else next(iter(kwargs.values()), None), output)

        return after

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def apart(order: list[list[str]], names: set[str]) -> list[list[str]]:
    """Stages of which each of the named layers has one of its own."""
    result: list[list[str]] = []
    for stage in order:
        last_is_alone = True
        for name in stage:
            if name in names or last_is_alone:
                result.append([])
            result[-1].append(name)
            last_is_alone = name in names
    return result


def stream_writers(block: nn.Module, call: Call) -> set[str]:
    """The linear layers whose output is added to the hidden states as it is, such as ``o_proj`` and ``down_proj``.

    A trial determines it: with all other layers silent, the block returns its input plus what the layer puts out.
    """
    usage, _ = used(block, call)
    layers = {name: layer for name, layer in linear_layers(block).items() if usage[name].returns_tensor}
    features, tokens = call.hidden.shape[-1], call.hidden.shape[:2].numel()
    found: set[str] = set()
    for name, layer in layers.items():
        if len(matrix(layer)) != features or usage[name].why_left(tokens) is not None:
            continue
        trial = torch.randn(features, generator=torch.Generator().manual_seed(0), device="cpu").to(call.hidden)
        outputs = {other: trial if other == name else trial.new_zeros(len(matrix(layers[other]))) for other in layers}
        with replaced({layers[other]: _constant(output) for other, output in outputs.items()}):
            if _gives(block, call, call.hidden + trial):
                found.add(name)
    return found


def _gives(block: nn.Module, call: Call, expected: Tensor) -> bool:
    try:
        return torch.allclose(call.of(block), expected)
    except ModelError:  # it cannot do without what a layer computes
        return False


def overwritten(block: nn.Module, call: Call) -> set[str]:
    """The linear layers whose output the block changes in place, as Falcon's does to save memory."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = (output, output.clone())

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in linear_layers(block).items()]
    try:
        call.of(block)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, (output, copy) in seen.items() if not torch.equal(output, copy)}


def _constant(output: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x, **_: output.expand(*x.shape[:-1], -1).clone()


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module runs the function given for it; afterwards what it ran before."""
    had = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in had.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
