"""Watches how a block uses its linear layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from opt8bit.ptq.model.blocks import linear_layers
from opt8bit.ptq.model.passes import Call


class Use(NamedTuple):
    """Says how a block used a layer in one pass."""

    calls: int = 0
    rows: int = 0  # of its input, all dimensions but the last together
    returns_tensor: bool = True

    def why_left(self, tokens: int) -> str | None:
        """Returns why a layer that is no expert cannot be rounded on what it sees, or None if it can."""
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
    """Returns how a block uses each of its layers, and which input it calls them with, in the order of the calls."""
    usage = {name: Use() for name in linear_layers(block)}
    order: list[tuple[str, Tensor]] = []

    def see(name: str, x: Any, output: Any) -> None:
        rows = x.numel() // x.shape[-1] if isinstance(x, Tensor) and x.numel() else 0
        had = usage[name]
        fine = isinstance(output, Tensor) and isinstance(x, Tensor) and had.returns_tensor
        usage[name] = Use(had.calls + 1, had.rows + rows, fine)
        order.append((name, x))

    with watched(linear_layers(block), see):
        call.of(block)
    return usage, order


@contextmanager
def watched(layers: dict[str, nn.Module], see: Callable[[str, Any, Any], object]) -> Iterator[None]:
    """Calls ``see(name, input, output)`` after each of the layers inside the context."""

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
