"""Layers that see only the tokens that are routed to them, such as those of experts.

Where the compressed model routes a token to another expert than the float model does, what the two see does not go
together token by token. So such layers are rounded on what they see in the compressed model, with no asymmetric target.
Padding counts: it is routed as well, and cannot be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from opt8bit.ptq import ranks
from opt8bit.ptq.calibration.statistics import Inputs
from opt8bit.ptq.compressed import Compressed
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.plan import LayerPlan
from opt8bit.ptq.rounding import RTN
from opt8bit.ptq.stage import compress_stage
from opt8bit.quant.grid import Grid
from opt8bit.quant.uniform import UniformGrid, is_uniform
from opt8bit.quant.weight import QuantizedWeight

# Tokens per feature. With fewer, their second moments have not full rank, and what rounding moves into the directions
# that they leave out comes back with other tokens. Measured on 256 features, against rounding to nearest: half to one
# token per feature gave 1.6 to 3.5 times the error where the inputs' spectrum falls slowly (as 1 / sqrt(i) or less),
# and 0.5 to 0.8 times where it falls as 1 / i.
LEAST = 1.0


def tokens_seen(x_hat: Sequence[Tensor]) -> int:
    """Returns the number of tokens that a layer has seen, of all processes."""
    return int(ranks.total([float(sum(x.shape[:-1].numel() for x in x_hat))])[0])


def are_enough(tokens: int, features: int) -> bool:
    """Tells whether the statistics of so many tokens are better than none."""
    return tokens >= LEAST * features


def compress_routed(
    layers: dict[str, nn.Module],
    x_hat: Sequence[Tensor],  # of each pass that called them, (..., d)
    tokens: int,
    plan: LayerPlan,
    corrected: set[str],
) -> dict[str, Compressed]:
    """Rounds layers on the tokens they have seen, or, where those are too few, to nearest on a grid from min to max.

    Args:
        layers: of a stage.
        x_hat: their inputs in the compressed model.
        tokens: that all processes have seen.
        plan: of the layers.
        corrected: names of the layers that get a bias from their own error, if there are statistics.

    Raises:
        ValueError: an input is not finite.
    """
    weight = matrix(next(iter(layers.values())))
    none = weight.new_zeros(1, 0, weight.shape[1])  # a process that has seen nothing takes part in the sums
    if are_enough(tokens, weight.shape[1]):
        inputs = [Inputs(x, x) for x in as_sequences(x_hat)] or [Inputs(none, none)]
        return compress_stage(layers, inputs, replace(plan, error_propagation=0.0), corrected)
    scheme, grid = plan.scheme, plan.scheme.grid
    if is_uniform(grid):
        grid = UniformGrid(grid.bits, symmetric=grid.symmetric, range="minmax", scale_dtype=grid.scale_dtype)
        scheme = replace(scheme, grid=grid)
    nearest = LayerPlan(RTN(), scheme)
    done = compress_stage(layers, [Inputs(none, none)], nearest, set())
    # How the range was found is not stored: the layers are as those of the plan.
    return {name: replace(layer, rounded=_on_grid(layer.rounded, plan.scheme.grid)) for name, layer in done.items()}


def _on_grid(rounded: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    return replace(rounded, parts=tuple(replace(part, grid=grid) for part in rounded.parts))


def as_sequences(x_hat: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tokens of each pass as one sequence, (1, length, d)."""
    return [x.reshape(1, -1, x.shape[-1]) for x in x_hat]


def of_all_features(layer: nn.Module) -> Tensor:
    """Returns inputs that weigh all weights of a layer alike, (1, d, d), for a layer that may see anything."""
    weight = matrix(layer)
    return torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device).unsqueeze(0)
