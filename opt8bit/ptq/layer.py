"""One stage of a block: layers that read the same input are rounded on its statistics, and their outputs corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opt8bit.ptq import bias as compensation
from opt8bit.ptq.blocks import matrix
from opt8bit.ptq.methods import Format, Method, Rounded
from opt8bit.ptq.statistics import Moments, Statistics
from opt8bit.ptq.target import asymmetric_target

Inputs = Sequence[tuple[Tensor, Tensor, Tensor | None]]  # x, x̂ (sequences, length, in) and mask of each batch


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what becomes of a layer.

    Args:
        method: rounds the weights.
        format: of the rounded weights.
        correct: the stream that Bias Compensation takes its errors from, of :data:`CORRECTIONS`: "none" for no bias;
            "local" for the float model's inputs, as in the paper; "sequential" for the inputs that the layer will
            see; "joint" for those, with the weights rounded on the centred covariance, so that the bias has its share.
        statistic: "mean" for least squares, "median" for least absolute error, "position" for a mean at each
            position of a sequence, which only this package can apply.
        error_propagation: strength of the asymmetric target, 0 to 1.

    Raises:
        ValueError: an argument is not one of these, or they contradict each other.
    """

    method: Method
    format: Format
    correct: str = "none"
    statistic: str = "mean"
    error_propagation: float = 0.5

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
        if not 0 <= self.error_propagation <= 1:
            raise ValueError(f"error_propagation must be from 0 to 1, got {self.error_propagation!r}")
        if self.error_propagation and not self.method.uses_hessian:
            raise ValueError(f"{self.method!r} looks at no inputs: error_propagation must be 0")


@dataclass(frozen=True)
class Compressed:
    """A layer's rounded weight and its whole bias: what it had, and what corrects it. Errors are of its output against
    the float model's, squared, relative to that output's own square."""

    rounded: Rounded
    bias: Tensor | None  # (out,), or (length, out) where it goes by position
    shift_norm: float
    error_rounded: float
    error_corrected: float


def compress_stage(
    layers: dict[str, nn.Module], inputs: Inputs, recipe: Recipe, corrected: set[str]
) -> dict[str, Compressed]:
    """Rounds the layers of a stage and corrects those that are named.

    Raises:
        ValueError: an input is not finite.
    """
    first = matrix(next(iter(layers.values())))
    dtype = torch.promote_types(first.dtype, torch.float32)
    weights = {name: matrix(layer).to(dtype) for name, layer in layers.items()}
    statistics = Statistics(first.shape[1], device=first.device)
    for x, x_hat, mask in inputs:
        statistics.update(x.to(dtype), x_hat.to(dtype), mask)
    moments = Moments(statistics, centred=False)
    rounded = {}
    for with_bias in (True, False):
        part = {name: weight for name, weight in weights.items() if (name in corrected) == with_bias}
        if part:
            # Where a bias will take the mean error, only the rest is the weights' to keep small.
            joint = with_bias and recipe.correct == "joint"
            rounded |= _round(part, Moments(statistics, centred=True) if joint else moments, recipe)
    result = {}
    for name, weight in weights.items():
        dense = rounded[name].dequantize()
        had: Tensor | None = layers[name].bias  # type: ignore[assignment]
        shift = _shift(weight, dense, statistics, inputs, recipe) if name in corrected else None
        bias = None if had is None else had.detach().to(dtype)
        if shift is not None:
            bias = shift if bias is None else bias + shift
        result[name] = Compressed(
            rounded[name],
            bias,
            0.0 if shift is None else float(shift.norm()),
            _output_error(weight, dense, None, statistics, moments),
            _output_error(weight, dense, shift, statistics, moments),
        )
    return result


def _round(weights: dict[str, Tensor], moments: Moments, recipe: Recipe) -> dict[str, Rounded]:
    """Rounds the weights of a stage, all rows together where the method goes row by row."""
    together = torch.cat(list(weights.values()))
    target = asymmetric_target(together, moments, recipe.error_propagation)
    parts = dict(zip(weights, target.split([len(weight) for weight in weights.values()]), strict=True))
    if not recipe.method.rowwise:
        return {name: recipe.method.round(part, moments.x_hat_x_hat, recipe.format) for name, part in parts.items()}
    whole = recipe.method.round(target, moments.x_hat_x_hat, recipe.format)
    result, start = {}, 0
    for name, part in parts.items():
        result[name] = whole.rows_from(start, start + len(part))
        start += len(part)
    return result


def _shift(weight: Tensor, rounded: Tensor, statistics: Statistics, inputs: Inputs, recipe: Recipe) -> Tensor:
    """What Bias Compensation adds to a layer's bias, in the dtype of the weight."""
    local = recipe.correct == "local"
    if recipe.statistic == "position":
        return compensation.position_shift(weight, rounded, inputs, local=local)
    shift, noise = compensation.mean_shift(weight, rounded, statistics, local=local)
    if recipe.statistic == "median":
        shift = compensation.median_shift(weight, rounded, inputs, local=local)
    return compensation.shrunk(shift, noise).to(weight.dtype)


def _output_error(
    weight: Tensor, rounded: Tensor, shift: Tensor | None, statistics: Statistics, moments: Moments
) -> float:
    """``E|W x - Ŵ x̂ - b|² / E|W x|²``; a shift by position counts by its mean, which leaves the error a bound."""
    weight, rounded = weight.to(moments.xx), rounded.to(moments.xx)
    signal = ((weight @ moments.xx) * weight).sum()
    error = signal - 2 * ((weight @ moments.cross) * rounded).sum() + ((rounded @ moments.x_hat_x_hat) * rounded).sum()
    if shift is not None:
        shift = shift if shift.dim() == 1 else shift.mean(0)
        mean = weight @ statistics.mean_x - rounded @ statistics.mean_x_hat
        error = error - 2 * (shift * mean).sum() + shift.square().sum()
    return float(error / signal) if signal > 0 else 0.0
