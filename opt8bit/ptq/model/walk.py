"""Forward passes that halt before chosen layers, so that a layer can be rounded while its inputs are at hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.model.anatomy import replaced


class Walk:
    """One forward pass that stands still until :meth:`advance` or :meth:`finish` lets it go on.

    Many batches can so stand before the same layer at once, each having run what lies before it exactly once, with
    nothing kept but what their passes still need.

    Args:
        forward: makes the pass and returns its result.

    Raises:
        ImportError: greenlet is not installed.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self._greenlet = greenlets().greenlet(forward)
        self._greenlet.is_walk = True
        self._greenlet.layer = None
        self._greenlet.arguments = ()
        self._answer: Any = None
        self._last: Tensor | None = None

    @property
    def layer(self) -> nn.Module | None:
        """The layer that the pass stands before, or None at its start and at its end."""
        return None if self._greenlet.dead else self._greenlet.layer

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the layer that the pass stands at; known where it stands behind one."""
        return self._greenlet.arguments

    @property
    def ended(self) -> bool:
        """Whether the pass has come to its end."""
        return self._greenlet.dead

    @property
    def x(self) -> Tensor:
        """The input of the layer that the pass stands before, or its result where it has ended."""
        assert self._last is not None
        return self._last

    def taken(self) -> Any:
        """Returns the result of a pass that has ended, and lets go of it."""
        result, self._last = self.x, None
        return result

    def answer(self, output: Any) -> None:
        """Takes the output of the layer that the pass stands before, which need not compute it, or behind."""
        self._answer = output

    def advance(self) -> Tensor:
        """Lets the pass run up to the next halt; returns the input of the layer it stands before.

        Raises:
            RuntimeError: the pass ended without another halt.
        """
        x = self.step()
        if self.ended:
            raise RuntimeError("a forward pass took another way than before: a layer was not reached")
        return x

    def finish(self) -> Tensor:
        """Lets the pass run to its end; returns its result.

        Raises:
            RuntimeError: it halts once more.
        """
        result = self.step()
        if not self.ended:
            raise RuntimeError("a forward pass took another way than before: a layer was reached again")
        return result

    def step(self) -> Tensor:
        """Lets the pass run up to the next halt or to its end; returns the layer's input, or the pass's result."""
        answer, self._answer, self._last = self._answer, None, None
        last: Tensor = self._greenlet.switch() if answer is None else self._greenlet.switch(answer)
        self._last = last
        return last

    def close(self) -> None:
        """Ends the pass wherever it stands."""
        self._greenlet.throw()


def greenlets() -> Any:
    """Returns the package that lets a pass stand still.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("greenlet")
    except ImportError as error:
        raise ImportError("greenlet is missing: pip install 'opt8bit[compress]'") from error


@contextmanager
def halting(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Lets every :class:`Walk` halt before each of the layers inside the context; other passes go through."""
    layers = list(layers)
    # A module that has no hook when it is called would not see those that come while a pass stands in it.
    handles = [layer.register_forward_pre_hook(lambda *_: None) for layer in layers]
    try:
        with replaced({layer: _halting(layer, layer.forward) for layer in layers}):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _halting(layer: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def halted(*args: Any, **kwargs: Any) -> Tensor:
        current = greenlets().getcurrent()
        if not getattr(current, "is_walk", False):
            return forward(*args, **kwargs)
        current.layer = layer
        answer = current.parent.switch(args[0] if args else next(iter(kwargs.values())))
        return answer if isinstance(answer, Tensor) else forward(*args, **kwargs)

    return halted


@contextmanager
def halting_behind(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Lets every :class:`Walk` halt behind each of the layers, with its output; other passes go through.

    What the walk is answered takes the place of the output.
    """
    with replaced({layer: _halting_behind(layer, layer.forward) for layer in layers}):
        yield


def _halting_behind(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def halted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        current = greenlets().getcurrent()
        if not getattr(current, "is_walk", False):
            return output
        current.layer, current.arguments = layer, (args, kwargs)
        answer = current.parent.switch(output)
        current.arguments = ()
        return output if isinstance(answer, tuple) and not answer else answer  # a switch without a value gives ()

    return halted


@contextmanager
def walks(forwards: Iterable[Callable[[], Tensor]]) -> Iterator[list[Walk]]:
    """Yields one :class:`Walk` for each pass, and closes them at the end, whatever happens."""
    opened = [Walk(forward) for forward in forwards]
    try:
        yield opened
    finally:
        for walk in opened:
            walk.close()
