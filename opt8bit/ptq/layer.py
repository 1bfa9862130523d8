"""One stage of a block: layers that read the same input are rounded on its statistics, and their outputs corrected."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from opt8bit.ptq import bias as compensation
from opt8bit.ptq import ranks
from opt8bit.ptq.arguments import check_fraction
from opt8bit.ptq.blocks import matrix
from opt8bit.ptq.methods import RTN, Method
from opt8bit.ptq.statistics import Inputs, Moments, Statistics
from opt8bit.ptq.target import asymmetric_target
from opt8bit.quant.grid import UniformGrid
from opt8bit.quant.weight import QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class Override:
    """What becomes of the layers of a name otherwise.

    Args:
        pattern: of names, with ``*``, ``?`` and ``[...]`` as a shell has them.
        method: rounds them; None leaves them as they are.
        scheme: of the rounded weights.
    """

    pattern: str
    method: Method | None
    scheme: WeightScheme


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what becomes of a layer.

    Args:
        method: rounds the weights.
        scheme: of the rounded weights.
        correct: the stream that Bias Compensation takes its errors from, of :data:`CORRECTIONS`: "none" for no bias;
            "local" for the float model's, as the paper's code has it: each layer's error on the float model's inputs,
            and in the block's last layer, if its output is added to the hidden states and it can hold a bias, the error
            of the whole block in its place; "sequential" for the inputs that the layer will see; "joint" for those,
            with the weights rounded on the centred covariance, so that the bias has its share.
        statistic: "mean" for least squares, "median" for least absolute error, both shrunk to what the data support;
            "position" for a mean at each position of a sequence, which only this package can apply.
        error_propagation: strength of the asymmetric target, 0 to 1: see :func:`asymmetric_target`. As much of the
            drift of the hidden states is in the errors that a bias of "sequential" or "joint" corrects.
        overrides: for layers by name; the last whose pattern fits is the one.

    Raises:
        ValueError: an argument is not one of these, or they contradict each other.
    """

    method: Method
    scheme: WeightScheme
    error_propagation: float
    correct: str = "none"
    statistic: str = "mean"
    overrides: tuple[Override, ...] = ()

    def of(self, name: str) -> Recipe | None:
        """The recipe for one layer; None where it stays as it is."""
        for override in reversed(self.overrides):
            if fnmatchcase(name, override.pattern):
                method = override.method
                if method is None:
                    return None
                correct = self.correct if method.uses_hessian or self.correct != "joint" else "sequential"
                strength = self.error_propagation if method.uses_hessian else 0.0
                return replace(
                    self,
                    method=method,
                    scheme=override.scheme,
                    error_propagation=strength,
                    correct=correct,
                    overrides=(),
                )
        return replace(self, overrides=())

    def __post_init__(self) -> None:
        if self.correct not in compensation.CORRECTIONS:
            allowed = ", ".join(compensation.CORRECTIONS)
            raise ValueError(f"correct must be one of {allowed}, got {self.correct!r}")
        if self.statistic not in compensation.SHIFTS:
            raise ValueError(f"statistic must be one of {', '.join(compensation.SHIFTS)}, got {self.statistic!r}")
        if self.correct == "none" and self.statistic != "mean":
            raise ValueError(f"statistic={self.statistic!r} has no bias to serve: correct is 'none'")
        if self.correct == "joint" and self.statistic != "mean":
            raise ValueError(f"correct='joint' is least squares: statistic must be 'mean', got {self.statistic!r}")
        if self.correct == "joint" and not self.method.uses_hessian:
            raise ValueError(f"{self.method!r} looks at no inputs: with correct='joint' it would round as ever")
        check_fraction("error_propagation", self.error_propagation)
        if self.error_propagation and not self.method.uses_hessian:
            raise ValueError(f"{self.method!r} looks at no inputs: error_propagation must be 0")
        if self.error_propagation and self.correct == "local":
            raise ValueError("correct='local' would undo what the asymmetric target does: error_propagation must be 0")


@dataclass(frozen=True)
class Compressed:
    """A layer's rounded weight, its whole bias, and the part of that which corrects.

    The bias and this part are (out,), or (length, out) where they go by position.
    """

    rounded: QuantizedWeight
    dtype: torch.dtype  # of the weight in its model
    bias: Tensor | None
    shift: Tensor | None

    @property
    def installed(self) -> Tensor:
        """The weight as the model will hold it, (out, in)."""
        return self.rounded.dequantize().to(self.dtype)

    def corrected(self, shift: Tensor) -> Compressed:
        """Returns the layer with ``shift`` added to its bias."""
        shift = shift.to(torch.promote_types(self.dtype, torch.float32))
        bias = shift if self.bias is None else self.bias + shift
        return replace(self, bias=bias, shift=shift if self.shift is None else self.shift + shift)

    @property
    def changes(self) -> dict[str, QuantizedWeight | Tensor]:
        """What has changed, by the names of the layer's parameters."""
        bias = {} if self.bias is None or self.shift is None else {"bias": self.bias}
        return {"weight": self.rounded, **bias}


def symmetry_cost(weight: Tensor, rounded: QuantizedWeight) -> float | None:
    """By how much a grid's symmetry raises the squared error of rounding to nearest; None where it is not symmetric."""
    part = rounded.parts[0]
    grid = part.grid
    if not isinstance(grid, UniformGrid) or not grid.symmetric:
        return None
    scheme = WeightScheme(grid, part.codes.shape[1] // part.params.scale.shape[1])
    free = UniformGrid(grid.bits, range=grid.range, scale_dtype=grid.scale_dtype)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    errors = []
    for each in (grid, free):
        nearest = RTN().round(weight, weight, replace(scheme, grid=each)).dequantize()
        errors.append(float((nearest - weight).square().sum()))
    return errors[0] / errors[1] - 1 if errors[1] else 0.0


def compress_stage(
    layers: dict[str, nn.Module],
    inputs: Sequence[Inputs],
    recipe: Recipe,
    corrected: set[str],
) -> dict[str, Compressed]:
    """Rounds the layers of a stage and corrects those that are named.

    Args:
        inputs: of the layers; if they say what is ``wanted``, of a single one.
        corrected: names of the layers that get a bias from their own error.

    Raises:
        ValueError: an input is not finite.
    """
    first = matrix(next(iter(layers.values())))
    dtype = torch.promote_types(first.dtype, torch.float32)
    weights = {name: matrix(layer).to(dtype) for name, layer in layers.items()}
    statistics = _statistics(inputs, recipe, dtype)
    rounded = {}
    for centred in (True, False):
        part = {n: weight for n, weight in weights.items() if (recipe.correct == "joint" and n in corrected) == centred}
        if part:
            # Where a bias will take the mean error, only the rest is the weights' to keep small.
            rounded |= _round(part, Moments(statistics, centred=centred), recipe)
    result = {}
    for name, weight in weights.items():
        had: Tensor | None = layers[name].bias  # type: ignore[assignment]
        own = matrix(layers[name]).dtype
        layer = Compressed(rounded[name], own, None if had is None else had.detach().to(dtype), None)
        if name in corrected:
            layer = layer.corrected(_shift(weight, layer.installed.to(dtype), statistics, inputs, recipe))
        result[name] = layer
    return result


def _statistics(inputs: Sequence[Inputs], recipe: Recipe, dtype: torch.dtype) -> Statistics:
    x, _, _, wanted = inputs[0]
    statistics = Statistics(
        x.shape[-1],
        hessian=recipe.method.uses_hessian,
        cross=recipe.error_propagation > 0,
        wanted=0 if wanted is None else wanted.shape[-1],
        device=x.device,
    )
    for batch in inputs:
        statistics.update(*batch.to(dtype))
    statistics.of_all_ranks()
    return statistics


def _round(weights: dict[str, Tensor], moments: Moments, recipe: Recipe) -> dict[str, QuantizedWeight]:
    """Rounds the weights of a stage, all rows together where the method goes row by row."""
    target, sizes = torch.cat(list(weights.values())), [len(weight) for weight in weights.values()]
    method, hessian = recipe.method, moments.x_hat_x_hat
    if recipe.error_propagation:
        target = asymmetric_target(target, _missing(target, moments), hessian, recipe.error_propagation)
    if not method.rowwise:
        parts = zip(weights, target.split(sizes), strict=True)
        return {name: method.round(part, hessian, recipe.scheme) for name, part in parts}
    own = method.round(ranks.rows_of_this(target), hessian, recipe.scheme)
    whole = own.by_row(lambda part: ranks.rows_of_all(part, len(target)))
    ends = list(itertools.accumulate(sizes))
    return {name: whole.rows_from(end - size, end) for name, size, end in zip(weights, sizes, ends, strict=True)}


def _missing(weight: Tensor, moments: Moments) -> Tensor:
    """``E[(y - W x̂) x̂ᵀ]``, (out, in)."""
    weight = weight.to(moments.cross.dtype)
    if moments.are_wanted:
        return moments.cross - weight @ moments.x_hat_x_hat
    return weight @ (moments.cross - moments.x_hat_x_hat)


def _shift(
    weight: Tensor,
    rounded: Tensor,
    statistics: Statistics,
    inputs: Sequence[Inputs],
    recipe: Recipe,
) -> Tensor:
    """What Bias Compensation adds to a layer's bias."""
    local = recipe.correct == "local"
    drift_share = 0.0 if inputs[0].wanted is None else recipe.error_propagation
    if recipe.statistic == "position":
        return compensation.position_shift(weight, rounded, inputs, local=local, drift_share=drift_share)
    if recipe.statistic == "median":
        shift, noise = compensation.median_shift(weight, rounded, inputs, local=local, drift_share=drift_share)
    else:
        shift, noise = compensation.mean_shift(weight, rounded, statistics, local=local, drift_share=drift_share)
    return compensation.shrunk(shift, noise)
