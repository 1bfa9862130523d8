"""One stage of a block: layers that read the same input are rounded on its statistics, and their outputs corrected."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq import ranks
from opt8bit.ptq.calibration.outputs import OutputErrors
from opt8bit.ptq.calibration.statistics import Inputs, InputStatistics, Moments, Statistics
from opt8bit.ptq.compressed import Compressed
from opt8bit.ptq.correction import bias as compensation
from opt8bit.ptq.correction.target import asymmetric_target
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.model.memory import return_freed
from opt8bit.ptq.plan import LayerPlan
from opt8bit.ptq.rounding.rounder import checked_round
from opt8bit.quant.weight import Outliers, QuantizedWeight


class Stage(NamedTuple):
    """Holds layers that are compressed, while the passes go through them."""

    layers: dict[str, Compressed]
    errors: OutputErrors
    seconds: float
    is_routed: bool = False  # whether the layers see only some of the tokens: their errors are complete


def by_plan(plans: dict[str, LayerPlan | None]) -> list[tuple[LayerPlan, list[str]]]:
    """Returns the layers of a stage that go together."""
    groups: list[tuple[LayerPlan, list[str]]] = []
    for name, plan in plans.items():
        group = next((names for other, names in groups if other == plan), None)
        if group is not None:
            group.append(name)
        elif plan is not None:
            groups.append((plan, [name]))
    return groups


def compress_stage(
    layers: dict[str, nn.Module],
    inputs: Sequence[Inputs],
    plan: LayerPlan,
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
    statistics = _statistics(inputs, plan, dtype)
    grid = plan.scheme.grid.for_weights(list(weights.values()))
    fitted = replace(plan, scheme=replace(plan.scheme, grid=grid))
    moments, rounded = Moments(statistics), {}
    for centred in (False, True):
        part = {
            n: weight
            for n, weight in weights.items()
            if (plan.bias_correction == "joint" and n in corrected) == centred
        }
        if part and centred:  # where a bias will take the mean error, only the rest is the weights' to keep small
            moments.centre()
        if part:
            rounded |= {n: _as_planned(each, plan) for n, each in _round(part, moments, fitted).items()}
    del moments
    result = {}
    for name, weight in weights.items():
        had: Tensor | None = layers[name].bias  # type: ignore[assignment]
        own = matrix(layers[name]).dtype
        layer = Compressed(rounded[name], own, None if had is None else had.detach().to(dtype), None)
        if name in corrected:
            layer = layer.corrected(_shift(weight, layer.installed.to(dtype), statistics, inputs, plan))
        result[name] = layer
    return result


def _statistics(inputs: Sequence[Inputs], plan: LayerPlan, dtype: torch.dtype) -> Statistics:
    statistics: Statistics | None = None
    for batch in inputs:
        statistics = statistics or Statistics(
            batch.x.shape[-1],
            hessian="second_moments" in plan.method.needs,
            cross=plan.error_propagation > 0,
            wanted=0 if batch.wanted is None else batch.wanted.shape[-1],
            device=batch.x.device,
        )
        statistics.update(*batch.to(dtype))
    assert statistics is not None, "there is no batch"
    return_freed()
    statistics.of_all_ranks()
    return statistics


def _round(weights: dict[str, Tensor], moments: Moments, plan: LayerPlan) -> dict[str, QuantizedWeight]:
    """Rounds the weights of a stage, all rows together where the method goes row by row."""
    target, sizes = torch.cat(list(weights.values())), [len(weight) for weight in weights.values()]
    statistics = InputStatistics(moments.x_hat_x_hat)
    if plan.error_propagation:
        args = moments.x_hat_x_hat, plan.error_propagation
        target = asymmetric_target(target, _missing(target, moments), *args)  # what is missing is not kept
    if not plan.method.rowwise:
        parts = zip(weights, target.split(sizes), strict=True)
        return {name: checked_round(plan.method, part, statistics, plan.scheme) for name, part in parts}
    own = checked_round(plan.method, ranks.rows_of_this(target), statistics, plan.scheme)
    whole = _of_all_ranks(own, len(target))
    ends = list(itertools.accumulate(sizes))
    return {name: whole.rows_from(end - size, end) for name, size, end in zip(weights, sizes, ends, strict=True)}


def _as_planned(rounded: QuantizedWeight, plan: LayerPlan) -> QuantizedWeight:
    """Returns a weight with the grids of its plan: what was fitted to the weights of a stage is in its params, too."""
    grids = plan.method.grids(plan.scheme)
    return replace(rounded, parts=tuple(replace(p, grid=grid) for p, grid in zip(rounded.parts, grids, strict=True)))


def _of_all_ranks(own: QuantizedWeight, rows: int) -> QuantizedWeight:
    """Returns the weight of which each process has rounded some rows."""
    outliers = own.outliers
    if outliers is not None:
        first = ranks.first_row(rows)
        new = outliers.rows + first >= ranks.rank() * own.shape[0]  # no process before has them
        kept = (outliers.rows[new] + first, outliers.columns[new], outliers.values[new])
        outliers = Outliers(*ranks.concatenated(*kept), whole_columns=outliers.whole_columns)
    return own.by_row(lambda part: ranks.rows_of_all(part, rows), outliers)


def _missing(weight: Tensor, moments: Moments) -> Tensor:
    """Returns ``E[(y - W x̂) x̂ᵀ]``, (out, in)."""
    weight = weight.to(moments.cross.dtype)
    if moments.are_wanted:
        return moments.cross - weight @ moments.x_hat_x_hat
    return weight @ (moments.cross - moments.x_hat_x_hat)


def _shift(
    weight: Tensor,
    rounded: Tensor,
    statistics: Statistics,
    inputs: Sequence[Inputs],
    plan: LayerPlan,
) -> Tensor:
    """Returns what Bias Compensation adds to a layer's bias."""
    local = plan.bias_correction == "local"
    drift_share = plan.error_propagation if statistics.sum_wanted.shape[1] else 0.0
    if plan.statistic == "position":
        return compensation.position_shift(weight, rounded, inputs, local=local, drift_share=drift_share)
    if plan.statistic == "median":
        shift, noise = compensation.median_shift(weight, rounded, inputs, local=local, drift_share=drift_share)
    else:
        shift, noise = compensation.mean_shift(weight, rounded, statistics, local=local, drift_share=drift_share)
    return compensation.shrunk(shift, noise)
