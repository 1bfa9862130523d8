"""Finds the rows that are the values in a layer that puts out queries, keys and values together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.passes import Call, ModelError

TOLERANCE = 1e-9


def value_rows(block: nn.Module, call: Call, producer: str, reader: str) -> Tensor | None:
    """Finds the channels of a producer that a reader's inputs are weighted sums of, int64, or None if there are none.

    With attention weights as they are, what a head puts out is linear in its values and in nothing else: of one of the
    reader's inputs ``t``, at one token, and the producer's outputs ``y``, only for the channel j of its own values is
    ``Σ y_ij ∂t / ∂y_ij`` (over tokens i) ``t`` itself.

    Args:
        block: in float64.
        call: of it.
        producer, reader: names of linear layers.
    """
    kept: dict[str, Tensor] = {}

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept["y"] = output.detach().requires_grad_()
        return kept["y"]

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["t"] = args[0]

    handles = [
        block.get_submodule(producer).register_forward_hook(cut),
        block.get_submodule(reader).register_forward_pre_hook(keep),
    ]
    try:
        with torch.enable_grad():
            call.of(block)
            if "y" not in kept or "t" not in kept or not kept["t"].requires_grad:
                return None
            return _rows(kept["y"], kept["t"].flatten(0, -2)[-1])
    except ModelError:
        return None
    finally:
        for handle in handles:
            handle.remove()


def _rows(y: Tensor, t: Tensor) -> Tensor | None:
    """Returns the channel of ``y`` (..., channels) for each of the inputs ``t`` (in,), each channel only once."""
    if y.shape[-1] <= len(t):
        return None
    found = []
    for value in t:
        (slope,) = torch.autograd.grad(value, y, retain_graph=True, allow_unused=True)
        if slope is None:
            return None
        sums = (y * slope).flatten(0, -2).sum(0)
        fitting = ((sums - value).abs() <= TOLERANCE * value.abs()).nonzero()[:, 0]
        if len(fitting) != 1:
            return None
        found.append(int(fitting[0]))
    return torch.tensor(sorted(set(found)), device=y.device)
