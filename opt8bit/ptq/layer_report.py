"""Reports on a compressed layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.compressed import Compressed
from opt8bit.ptq.model.bias_places import Place
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.rounding import RTN
from opt8bit.quant.uniform import UniformGrid, is_uniform
from opt8bit.quant.weight import QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class LayerReport:
    """Says what was done to one layer.

    Attributes:
        name: of the layer in the model.
        shape: (out, in).
        bits_per_weight: everything stored counted, but the bias.
        error_rounded: of the output against the float model's, squared, relative to the square of that output.
        error_corrected: the same with the bias; higher, maybe, where that is from the error of the whole block.
        bias_norm: of what Bias Compensation added.
        bias_bytes: that it takes beyond what the layer had, at the model's dtype; 0 where another layer holds it.
        bias_place: what holds it: "own", a switch of the configuration, "through NAME"; None if there is none.
        symmetry_cost: by how much the grid's symmetry raises the squared error of rounding to nearest; negative where
            it lowers it; None without it.
        note: why the weight is of another type than was asked for; why there is no correction where one was asked for,
            or which servers do not use the bias.
        seconds: of the layer's stage, shared among its layers.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    error_rounded: float
    error_corrected: float
    bias_norm: float
    bias_bytes: int
    bias_place: str | None
    symmetry_cost: float | None
    note: str
    seconds: float

    @property
    def weights(self) -> int:
        """The number of its weights."""
        return math.prod(self.shape)

    @property
    def stored_bits(self) -> int:
        """The bits of everything stored, except the bias."""
        return round(self.bits_per_weight * self.weights)


def layer_report(
    name: str,
    had: nn.Module,
    layer: Compressed,
    errors: tuple[float, float],
    place: Place | None,
    note: str,
    seconds: float,
) -> LayerReport:
    """Returns the report on a layer that had these weights and bias."""
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
        note=note,
        seconds=seconds,
    )


def symmetry_cost(weight: Tensor, rounded: QuantizedWeight) -> float | None:
    """Returns by how much a grid's symmetry raises the squared error of rounding to nearest, or None without it."""
    part = rounded.parts[0]
    grid = part.grid
    if not is_uniform(grid) or not grid.symmetric:
        return None
    scheme = WeightScheme(grid, part.codes.shape[1] // part.params.scale.shape[1])
    free = UniformGrid(grid.bits, range=grid.range, scale_dtype=grid.scale_dtype)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    errors = []
    for each in (grid, free):
        nearest = RTN().round(weight, InputStatistics(), replace(scheme, grid=each)).dequantize()
        errors.append(float((nearest - weight).square().sum()))
    return errors[0] / errors[1] - 1 if errors[1] else 0.0
