"""One pass through a block: what the model calls it with, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from opt8bit.ptq.model.states import State, at, copied, hidden_in, is_cache


class ModelError(RuntimeError):
    """An exception that the model's own code has raised."""


class Refused(ValueError):
    """Raised where calibration cannot follow what a model does with its blocks."""


# What to do about activations that are beyond the largest float16, 65504.
OVERFLOW = (
    "its activations are too large for float16: compute in another dtype, by --dtype bfloat16 or float32, or from "
    "Python ptq.Checkpoint(folder, dtype=torch.bfloat16), or model.to(torch.bfloat16)"
)


@contextmanager
def raised_by(what: str, kind: type[ModelError | Refused] = ModelError) -> Iterator[None]:
    """Reports an exception inside the context as one of the model's own code.

    Raises:
        ModelError: one was raised; its cause is the exception itself. Or another ``kind``, if that is given.
    """
    try:
        yield
    except (ModelError, Refused):
        raise
    except Exception as error:
        raise kind(f"{what} raised {type(error).__name__}: {error}") from error


class Call(NamedTuple):
    """Records how a model called one of its blocks.

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
        fields: what the block's modules keep in attributes of theirs, as it is before a pass: module, name, value.
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
    fields: tuple[tuple[str, str, Any], ...] = ()

    def of(self, block: nn.Module) -> Tensor:
        """Returns the hidden states that ``block`` makes of this call. It can be run again: what it changes is lost."""
        return self.hidden_of(self.output(block))

    def output(self, block: nn.Module) -> Any:
        """Returns everything that ``block`` returns, as :meth:`of`."""
        state = self.state or State()
        return self._run(block, copied(state.own((self.args, self.kwargs)), {}))

    def through(self, block: nn.Module) -> Tensor:
        """Returns the hidden states that ``block`` makes, where this is the stream's only pass through it.

        What it changes, or hands on besides the hidden states, is there for the stream's later blocks.
        """
        state = self.state or State()
        output = self._run(block, state.own((self.args, self.kwargs)))
        for path, recorded in self.hands:
            state.hand(recorded, at(output, path))
        state.keep(self.later)
        return self.hidden_of(output)

    def repeatable(self) -> Call:
        """Returns the same call for a later :meth:`of`; meanwhile the stream's own pass may go through the block."""
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
        try:
            reset(block, self.fields)
            with raised_by(f"the model's block {self.name}"):
                return block(*args, **kwargs)
        finally:
            reset(block, self.fields)

    def hidden_of(self, output: Any) -> Tensor:
        """Returns the hidden states in what a block has returned."""
        hidden: Tensor = hidden_in(output)
        return hidden if self.axes == (0, 1) else hidden.movedim(self.axes, (0, 1))

    def without_cache(self) -> Call:
        """Returns the same call with nothing to keep keys, values or states of earlier calls in."""
        args = tuple(None if is_cache("", value) else value for value in self.args)
        kwargs = {name: None if is_cache(name, value) else value for name, value in self.kwargs.items()}
        if isinstance(kwargs.get("use_cache"), bool):
            kwargs["use_cache"] = False
        return self._replace(args=args, kwargs=kwargs)


def reset(block: nn.Module, fields: tuple[tuple[str, str, Any], ...]) -> None:
    """Makes a block's modules forget the passes that have gone through them."""
    for module, name, value in fields:
        setattr(block.get_submodule(module), name, value)
