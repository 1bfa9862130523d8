"""Layers that are compressed together, and what there is to report on them."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from opt8bit.ptq.blocks import matrix
from opt8bit.ptq.layer import Compressed, Recipe, symmetry_cost
from opt8bit.ptq.outputs import OutputErrors
from opt8bit.ptq.placement import Place
from opt8bit.ptq.result import LayerReport


class Stage(NamedTuple):
    """Layers that are compressed, while the passes go through them."""

    layers: dict[str, Compressed]
    errors: OutputErrors
    seconds: float
    is_routed: bool = False  # whether the layers see only some of the tokens: their errors are complete


def by_recipe(recipes: dict[str, Recipe | None]) -> list[tuple[Recipe, list[str]]]:
    """Layers of a stage that go together."""
    groups: list[tuple[Recipe, list[str]]] = []
    for name, recipe in recipes.items():
        group = next((names for other, names in groups if other == recipe), None)
        if group is not None:
            group.append(name)
        elif recipe is not None:
            groups.append((recipe, [name]))
    return groups


def layer_report(
    name: str,
    had: nn.Module,
    layer: Compressed,
    errors: tuple[float, float],
    place: Place | None,
    note: str | None,
    seconds: float,
) -> LayerReport:
    """The report on a layer that had these weights and bias."""
    weight, shift = matrix(had), layer.shift
    moved = place is not None and place.kind == "through"
    stored = 0
    if shift is not None and layer.bias is not None and not moved:
        stored = layer.bias.numel() - (0 if had.bias is None else len(weight))
    return LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        bits_per_weight=layer.rounded.bits_per_weight,
        error_rounded=errors[0],
        error_corrected=errors[1],
        bias_norm=0.0 if shift is None else float(shift.norm()),
        bias_bytes=stored * weight.element_size(),
        bias_place=None if shift is None else str(place),
        symmetry_cost=symmetry_cost(weight, layer.rounded),
        note=note or "",
        seconds=seconds,
    )
