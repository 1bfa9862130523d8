"""Forward passes that halt before chosen layers, so that a layer can be rounded while its inputs are at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_this = threading.local()


class Walk:
    """One forward pass, in a thread of its own; it runs only while :meth:`advance` waits for it.

    Many batches can so stand before the same layer at once, each having run what lies before it exactly once, with
    nothing kept but what their passes still need.

    Args:
        forward: makes the pass and returns its result.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self._forward = forward
        self._go = threading.Semaphore(0)
        self._halted = threading.Semaphore(0)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> Tensor:
        """Lets the pass run up to the next halt; returns the input of the layer it stands before.

        Raises:
            RuntimeError: the pass ended without another halt.
        """
        self._resume()
        if self._input is None:
            raise RuntimeError("the forward pass took another way than before: a layer was not reached")
        return self._input

    def finish(self) -> Tensor:
        """Lets the pass run to its end; returns its result.

        Raises:
            RuntimeError: it halts once more.
        """
        self._resume()
        if self._output is None:
            raise RuntimeError("the forward pass took another way than before: a layer was reached again")
        return self._output

    def close(self) -> None:
        """Ends the pass wherever it stands."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def _resume(self) -> None:
        self._input = None
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        self._go.acquire()
        _this.walk = self
        try:
            if not self._closed:
                with torch.no_grad():
                    self._output = self._forward()
        except _Closed:
            pass
        except BaseException as error:  # raised again where the pass is waited for
            self._error = error
        finally:
            self._halted.release()

    def _halt(self, x: Tensor) -> None:
        self._input = x
        self._halted.release()
        self._go.acquire()
        if self._closed:
            raise _Closed


class _Closed(BaseException):
    """Ends the thread of a pass that nobody waits for."""


@contextmanager
def halting(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every :class:`Walk` halts before each of the layers."""

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _this.walk._halt(inputs[0])

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def walks(forwards: Iterable[Callable[[], Tensor]]) -> Iterator[list[Walk]]:
    """One :class:`Walk` for each pass; closed at the end, whatever happens."""
    opened = [Walk(forward) for forward in forwards]
    try:
        yield opened
    finally:
        for walk in opened:
            walk.close()
