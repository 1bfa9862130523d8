"""One pass of a few tokens through the whole model, before anything is rounded: what its blocks do, and return.

It is also the proof that the blocks can be run one at a time, apart from their model: what they compute then has to be
what they compute in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.anatomy import Anatomy, anatomy, replaced
from opt8bit.ptq.model.blocks import linear_layers
from opt8bit.ptq.model.ends import ModelEnd
from opt8bit.ptq.model.passes import OVERFLOW, Call, ModelError, Refused, raised_by
from opt8bit.ptq.model.recording import block_calls, changed_between, check_order, same_hidden, taken
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.model.states import State, copied, flattened, placeholder
from opt8bit.ptq.model.walk import halting, walks


class Part(NamedTuple):
    """Holds what is known of a block."""

    anatomy: Anatomy
    output: Any  # what it returned
    changes: bool  # whether it changes what it shares with other blocks
    clones: bool  # whether it overwrites its hidden states
    fields: tuple[tuple[str, str, Any], ...]  # what its modules keep in attributes, as it was: module, name, value


class Rehearsal(NamedTuple):
    """Holds what is known of a model.

    Attributes:
        parts: of each block.
        axes: dimensions of sequences and length in the model's own hidden states.
        keeps_cache: whether its blocks compute something else without a cache.
    """

    parts: list[Part]
    axes: tuple[int, int]
    keeps_cache: bool

    @property
    def outputs(self) -> list[Any]:
        """The output of each block."""
        return [part.output for part in self.parts]

    def calls(self, model: nn.Module, blocks: nn.ModuleList, batch: dict[str, Tensor]) -> list[Call]:
        """Returns how the model calls its blocks on a batch; see :func:`block_calls`."""
        calls = block_calls(model, blocks, batch, self.outputs, axes=self.axes, keeps_cache=self.keeps_cache)
        return [
            call._replace(clones=part.clones, fields=part.fields) for call, part in zip(calls, self.parts, strict=True)
        ]

    def hands_on_more(self, calls: Sequence[Call]) -> bool:
        """Tells whether blocks hand more to later ones than their hidden states.

        Args:
            calls: of the blocks, on any batch.
        """
        return any(part.changes for part in self.parts) or any(call.hands for call in calls)


def rehearse(source: Source, prefix: str, blocks: nn.ModuleList, few: dict[str, Tensor]) -> Rehearsal:
    """Runs the model on few tokens, as it is, with its cache, and looks at each block on the way.

    Raises:
        Refused: blocks cannot be run apart from their model. The message says why.
        ModelError: the model raised an exception.
    """
    watch = _Watch(source, prefix, few["input_ids"].shape)
    visits = {block: watch.visit(i, block.forward) for i, block in enumerate(blocks)}
    with replaced(visits), raised_by("the model"):
        output: Any = source.model(**few)
    if len(watch.parts) < len(blocks):
        name = type(source.model).__name__
        raise Refused(f"{name} called {len(watch.parts)} of its {len(blocks)} blocks, {prefix}.*")
    _check_arguments(source.model, blocks, few, watch)
    _check_end(source.model, blocks, few, watch, getattr(output, "logits", None))
    return Rehearsal(watch.parts, watch.calls[0].axes, watch.keeps_cache)


class _Watch:
    """Looks at each block when the model calls it.

    Args:
        source: of the model.
        prefix: the name of the list of blocks.
        tokens: (sequences, length) of the model's input.

    Attributes:
        parts: of the blocks so far.
        calls: of the blocks so far, as the model made them.
        made: what they returned in the model.
        keeps_cache: whether a block computed something else without a cache.
    """

    def __init__(self, source: Source, prefix: str, tokens: torch.Size) -> None:
        self.source, self.prefix, self.tokens = source, prefix, tokens
        self.model = source.model
        self.parts: list[Part] = []
        self.calls: list[Call] = []
        self.made: list[Any] = []
        self.keeps_cache = False

    def visit(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what block i runs in place of its own ``forward``."""

        def visited(*args: Any, **kwargs: Any) -> Any:
            check_order(self.model, i, len(self.parts))
            axes = self.calls[0].axes if self.calls else None
            call = taken(args, kwargs, self.tokens, axes)._replace(name=f"{self.prefix}.{i}")
            if self.calls and not same_hidden(call.hidden_of(self.made[-1]), call.hidden):
                raise changed_between(i)
            if not self.calls:
                _check_range("what goes into", call.name, call.hidden)
            # What the block is called with has to outlive the call, in which it may change.
            hidden, own_args, own_kwargs = placeholder((call.hidden, call.args, call.kwargs))
            self.calls.append(call._replace(hidden=hidden, args=own_args, kwargs=own_kwargs))
            with self.source.block(call.name) as block, replaced({block: forward}):
                before = _attributes(block)
                with raised_by(f"the model's block {call.name}"):
                    self.made.append(block(*args, **kwargs))
                _check_range("what comes out of", call.name, call.hidden_of(self.made[-1]))
                self.parts.append(self._look(block, _changed(before, block)))
            return self.made[-1]

        return visited

    def _look(self, block: nn.Module, fields: tuple[tuple[str, str, Any], ...]) -> Part:
        self.calls[-1] = self.calls[-1]._replace(fields=fields)
        call = self._apart(block)
        clones = _overwrites(block, call)
        call = call._replace(clones=clones)
        if fields:
            _check_interleaved(block, call)
        return Part(anatomy(block, call), call.output(block), _changes(block, call), clones, fields)

    def _apart(self, block: nn.Module) -> Call:
        """Returns the call as it is to be made apart from the model: without the cache, unless the block needs it.

        Raises:
            Refused: either way the block computes something else than it has in the model.
        """
        call, expected = self.calls[-1], self.calls[-1].hidden_of(self.made[-1])
        for candidate in (call.without_cache(), call):
            if _agree(candidate._replace(clones=True).of(block), expected):
                self.keeps_cache |= candidate is call
                return candidate
        raise Refused(f"{call.name} computes something else when it is run apart from its {type(self.model).__name__}")


def _check_range(what: str, block: str, hidden: Tensor) -> None:
    """
    Raises:
        Refused: hidden states have overflowed, in float16. In other dtypes the layer that sees them reports it.
    """
    if hidden.dtype == torch.float16 and not bool(hidden.isfinite().all()):
        raise Refused(f"{what} {block} is not finite: {OVERFLOW}")


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Tells whether they are the same up to rounding: in half of their digits."""
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return found.shape == expected.shape  # what is not finite is reported with the layer that sees it
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return float((found - expected).float().norm()) <= tolerance * float(expected.float().norm())


def _overwrites(block: nn.Module, call: Call) -> bool:
    """Tells whether a block changes its hidden states in place."""
    call = call._replace(hidden=call.hidden.clone())
    version = call.hidden._version
    call.of(block)
    return call.hidden._version != version


Attributes = dict[tuple[str, str], Any]  # by the module's name and their own


def _attributes(block: nn.Module) -> Attributes:
    """Returns the attributes and buffers of a block's modules that are tensors, or nothing yet."""
    return {
        (module_name, name): value
        for module_name, module in block.named_modules()
        for name, value in (*vars(module).items(), *module.named_buffers(recurse=False))
        if value is None or isinstance(value, Tensor)
    }


def _changed(before: Attributes, block: nn.Module) -> tuple[tuple[str, str, Any], ...]:
    """Returns what other values a block's modules had for their attributes before a pass."""
    after = _attributes(block)
    return tuple((*key, value) for key, value in before.items() if after.get(key, value) is not value)


def _check_interleaved(block: nn.Module, call: Call) -> None:
    """
    Raises:
        Refused: modules keep something for other layers of the same pass, which another pass would overwrite.
    """
    other = call._replace(hidden=call.hidden.flip(1))
    expected = [one.of(block) for one in (call, other)]
    try:
        found = _interleaved(block, call, other)
    except ModelError:
        found = []
    if not found or not all(map(_agree, found, expected)):
        names = ", ".join(f"{module}.{name}".lstrip(".") for module, name, _ in call.fields)
        raise Refused(f"{call.name} keeps what it needs in one pass in attributes of its modules: {names}")


def _interleaved(block: nn.Module, *calls: Call) -> list[Tensor]:
    """Returns the hidden states that a block makes of calls, each pass going on to its next layer in turn."""
    with halting(linear_layers(block).values()), walks([partial(call.of, block) for call in calls]) as passes:
        while not all(walk.ended for walk in passes):
            for walk in passes:
                if not walk.ended:
                    walk.step()
        return [walk.x for walk in passes]


def _changes(block: nn.Module, call: Call) -> bool:
    """Tells whether a block changes a container that it is called with.

    Raises:
        Refused: it changes a tensor.
    """
    args, kwargs = copied((call.args, call.kwargs), {})
    parts = [part for _, part in flattened((args, kwargs))]
    versions = [part._version for part in parts if isinstance(part, Tensor)]
    state = State()
    state.hand(call.args, args)
    state.hand(call.kwargs, kwargs)
    call._replace(state=state).through(block)
    after = [part for _, part in flattened((args, kwargs))]
    if versions != [part._version for part in parts if isinstance(part, Tensor)]:
        raise Refused(f"{call.name} overwrites a tensor that it is called with")
    return [id(part) for part in parts] != [id(part) for part in after]


def _check_arguments(model: nn.Module, blocks: nn.ModuleList, few: dict[str, Tensor], watch: _Watch) -> None:
    """
    Raises:
        Refused: a block gets what depends on the blocks before it, other than the hidden states and what they return.
    """
    axes = watch.calls[0].axes
    calls = block_calls(model, blocks, few, watch.made, axes=axes, keeps_cache=True, as_made=True)
    for call, made in zip(calls, watch.calls, strict=True):
        for name, value in {**dict(enumerate(call.args)), **call.kwargs}.items():
            real = made.args[name] if isinstance(name, int) else made.kwargs.get(name)
            if not _same(value, real):
                argument = name if isinstance(name, str) else f"argument {name + 1}"
                raise Refused(f"{made.name} gets {argument} from the model, which depends on the blocks before it")


def _same(value: Any, real: Any) -> bool:
    """Tells whether two arguments are the same, up to what blocks may change of them."""
    if isinstance(value, tuple) and isinstance(real, tuple):
        return len(value) == len(real) and all(_same(*parts) for parts in zip(value, real, strict=True))
    if isinstance(value, Tensor) and isinstance(real, Tensor):
        if value.is_floating_point():
            return _agree(value, real)
        return value.shape == real.shape and torch.equal(value, real)
    return isinstance(value, Tensor) == isinstance(real, Tensor)


def _check_end(model: nn.Module, blocks: nn.ModuleList, few: dict[str, Tensor], watch: _Watch, logits: Any) -> None:
    """
    Raises:
        Refused: the logits depend on more than what the last block puts out.
    """
    outputs, axes = [part.output for part in watch.parts], watch.calls[0].axes
    found = ModelEnd(model, blocks, outputs, axes).logits(few, watch.calls[-1].hidden_of(watch.made[-1]))
    if isinstance(logits, Tensor) and isinstance(found, Tensor) and not _agree(found, logits):
        raise Refused(f"{type(model).__name__} makes its logits of more than what its last block puts out")
