"""Forward passes that halt before chosen layers, so that a layer can be rounded while its inputs are at hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.calls import replaced


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
        self._answer: Tensor | None = None

    def answer(self, output: Tensor) -> None:
        """Takes the output of the layer that the pass stands before: it need not be computed again."""
        self._answer = output

    def advance(self) -> Tensor:
        """Lets the pass run up to the next halt; returns the input of the layer it stands before.

        Raises:
            RuntimeError: the pass ended without another halt.
        """
        x = self._go_on()
        if self._greenlet.dead:
            raise RuntimeError("a forward pass took another way than before: a layer was not reached")
        return x

    def finish(self) -> Tensor:
        """Lets the pass run to its end; returns its result.

        Raises:
            RuntimeError: it halts once more.
        """
        result = self._go_on()
        if not self._greenlet.dead:
            raise RuntimeError("a forward pass took another way than before: a layer was reached again")
        return result

    def _go_on(self) -> Tensor:
        answer, self._answer = self._answer, None
        return self._greenlet.switch() if answer is None else self._greenlet.switch(answer)

    def close(self) -> None:
        """Ends the pass wherever it stands."""
        self._greenlet.throw()


def greenlets() -> Any:
    """The package that lets a pass stand still.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("greenlet")
    except ImportError as error:
        raise ImportError("greenlet is missing: pip install 'opt8bit[compress]'") from error


@contextmanager
def halting(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every :class:`Walk` halts before each of the layers; other passes go through."""
    layers = list(layers)
    # A module that has no hook when it is called would not see those that come while a pass stands in it.
    handles = [layer.register_forward_pre_hook(lambda *_: None) for layer in layers]
    try:
        with replaced({layer: _halting(layer.forward) for layer in layers}):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _halting(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def halted(x: Tensor) -> Tensor:
        current = greenlets().getcurrent()
        answer = current.parent.switch(x) if getattr(current, "is_walk", False) else None
        return answer if isinstance(answer, Tensor) else forward(x)

    return halted


@contextmanager
def walks(forwards: Iterable[Callable[[], Tensor]]) -> Iterator[list[Walk]]:
    """One :class:`Walk` for each pass; closed at the end, whatever happens."""
    opened = [Walk(forward) for forward in forwards]
    try:
        yield opened
    finally:
        for walk in opened:
            walk.close()
