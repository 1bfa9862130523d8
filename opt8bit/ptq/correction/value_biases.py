"""Biases of attention values that have no place of their own, moved through the output projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.compressed import Compressed
from opt8bit.ptq.model.bias_places import Places


def value_bias_through(places: Places, layers: dict[str, Compressed], model: nn.Module) -> None:
    """Moves the biases of attention values that have no place of their own into the output projections, exactly."""
    for name, layer in list(layers.items()):
        place = places.get(name)
        if place is None or place.kind != "through" or layer.bias is None:
            continue
        output = layers[place.name]
        weight = output.installed.to(layer.bias.dtype)
        moved = weight @ _per_query_head(layer.bias, weight.shape[1], model)
        layers[name] = replace(layer, bias=None)
        layers[place.name] = output.corrected(moved)


def _per_query_head(bias: Tensor, features: int, model: nn.Module) -> Tensor:
    """Returns a bias of the values as the output projection sees it: heads that share values repeat them."""
    shared = features // len(bias)
    if shared == 1:
        return bias
    config: Any = model.config
    head = features // config.num_attention_heads
    return bias.view(-1, head).repeat_interleave(shared, 0).flatten()
