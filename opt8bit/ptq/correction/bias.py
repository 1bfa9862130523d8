"""Bias Compensation: the bias that makes up for what rounding did to the mean or median output of a layer, or block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from opt8bit.ptq import ranks
from opt8bit.ptq.calibration.statistics import Inputs, Statistics

CHANNELS = 64  # whose errors are in memory together for a median


def mean_shift(
    weight: Tensor,  # (out, in)
    rounded: Tensor,  # (out, in)
    statistics: Statistics,
    *,
    local: bool = False,
    drift_share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns ``W E[x] - Ŵ E[x̂]``, the constant of least squared output error; ``local`` has x for x̂.

    The mean squared error falls by the square of the constant, channel by channel, and never rises. For a layer whose
    output is added to hidden states that have drifted by δ, ``drift_share`` times δ is part of the error.

    Returns:
        The shift, (out,), and its standard error, (out,): tokens of one sequence go together, so that it is told from
        how the sequences differ. Infinite where there is only one.

    Source: Minimize Quantization Output Error with Bias Compensation, equation 6.
    """
    dtype = statistics.sum_x.dtype
    outputs = statistics.sum_x @ weight.to(dtype).T  # (sequences, out), over tokens
    rounded_outputs = (statistics.sum_x if local else statistics.sum_x_hat) @ rounded.to(dtype).T
    if drift_share:
        outputs = outputs.lerp(statistics.sum_wanted, drift_share)
    shifts = outputs - rounded_outputs
    return _mean(shifts, statistics.tokens)


def _mean(sums: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean over tokens whose sequences are independent, and its standard error: a ratio estimator's."""
    mean = sums.sum(0) / tokens.sum()
    sequences = int((tokens > 0).sum())
    if sequences < 2:
        return mean, torch.full_like(mean, torch.inf)
    residuals = sums - tokens[:, None] * mean
    return mean, ratio_error(residuals.square().sum(0), sequences, tokens.sum())


def ratio_error(squares: Tensor, sequences: int | Tensor, tokens: Tensor) -> Tensor:
    """Returns the standard error of a mean over tokens, from how far each sequence's sum is from its share.

    Args:
        squares: ``Σ (sum - tokens · mean)²`` over sequences.
        sequences: that have tokens which count; at least 2.
        tokens: of all sequences.
    """
    return (squares * sequences / (sequences - 1)).sqrt() / tokens


def median_shift(
    weight: Tensor,  # (out, in)
    rounded: Tensor,  # (out, in)
    inputs: Sequence[Inputs],
    *,
    local: bool = False,
    drift_share: float = 0.0,
    channels: int = CHANNELS,
) -> tuple[Tensor, Tensor]:
    """Returns the median over tokens of ``W x - Ŵ x̂``, channel by channel: the constant of least absolute error.

    Arguments as of :func:`mean_shift`, with the inputs in place of their sums.

    Returns:
        The shift, (out,), and its standard error, (out,), told from how the medians of the sequences differ.

    Source: Minimize Quantization Output Error with Bias Compensation, section 3, with the absolute error.
    """
    return _medians(
        lambda part: [_errors(weight, rounded, batch, part, local, drift_share) for batch in inputs],
        len(weight),
        channels,
    )


def _medians(errors: Callable[[slice], Sequence[Tensor]], outputs: int, channels: int) -> tuple[Tensor, Tensor]:
    """Returns the medians of every channel over tokens, and their standard errors."""
    shifts, noises = [], []
    for start in range(0, outputs, channels):
        part = errors(slice(start, start + channels))
        shifts.append(torch.cat([error.flatten(0, 1) for error in part]).nanmedian(0).values)
        of_sequences = torch.cat([error.nanmedian(1).values for error in part])
        noises.append(_spread(of_sequences[~of_sequences.isnan().any(1)]))
    return torch.cat(shifts), torch.cat(noises)


def _errors(weight: Tensor, rounded: Tensor, batch: Inputs, part: slice, local: bool, drift_share: float) -> Tensor:
    """Returns a batch's errors in some channels, (sequences, length, channels): NaN where a token does not count."""
    x, x_hat, mask, wanted, _ = batch.to(weight.dtype)
    outputs = linear(x, weight[part])
    if drift_share and wanted is not None:
        outputs = outputs.lerp(wanted[..., part], drift_share)
    error = outputs - linear(x if local else x_hat, rounded[part])
    return error if mask is None else torch.where(mask.bool().unsqueeze(-1), error, torch.nan)


def _spread(of_sequences: Tensor) -> Tensor:
    """Returns the standard error of what sequences (n, channels) say, each for itself; infinite for a single one."""
    count = len(of_sequences)
    return of_sequences.std(0) / count**0.5 if count > 1 else torch.full_like(of_sequences[0], torch.inf)


def position_shift(
    weight: Tensor,  # (out, in)
    rounded: Tensor,  # (out, in)
    inputs: Sequence[Inputs],
    *,
    local: bool = False,
    drift_share: float = 0.0,
) -> Tensor:
    """Returns ``W E[x_t] - Ŵ E[x̂_t]`` at each position t of a sequence, (length, out): 0 where no token counts.

    Arguments as of :func:`mean_shift`, with the inputs in place of their sums. Takes ``length`` times the memory of a
    bias, is not shrunk, and no server applies it: for comparison.

    Raises:
        ValueError: the batches' sequences differ in length.

    Source: Minimize Quantization Output Error with Bias Compensation, section 3, where the bias has the output's shape.
    """
    return _by_position(_errors(weight, rounded, batch, slice(None), local, drift_share) for batch in inputs)


def _by_position(errors: Iterable[Tensor]) -> Tensor:
    """Returns the mean over sequences at each position, (length, out)."""
    total, tokens = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    for error in errors:
        if total.dim() and len(total) != error.shape[1]:
            raise ValueError(f"a bias by position takes sequences of one length, got {len(total)} and {error.shape[1]}")
        total = total + error.nansum(0)
        tokens = tokens + (~error[..., 0].isnan()).sum(0)
    return total / tokens.clamp(min=1)[:, None]


def block_shift(errors: Iterable[Tensor], statistic: str) -> Tensor:
    """Returns the bias that makes up for what a whole block puts out wrong.

    Args:
        errors: of each batch, (sequences, length, h), the float block's output minus the rounded one's for the same
            inputs; NaN where a token does not count.
        statistic: of :data:`SHIFTS`; a mean is that of all processes' tokens.

    Returns:
        (h,), shrunk to what the data support; or (length, h) by position.

    Source: the code of Minimize Quantization Output Error with Bias Compensation, where every block has such a bias
    beside those of its layers.
    """
    if statistic == "position":
        return _by_position(errors)
    if statistic == "median":
        kept = list(errors)
        return shrunk(*_medians(lambda part: [error[..., part] for error in kept], kept[0].shape[-1], CHANNELS))
    sums, tokens = [], []
    for error in errors:
        sums.append(error.nansum(1, dtype=torch.float64))
        tokens.append((~error[..., 0].isnan()).sum(1))
    return shrunk(*_mean(*ranks.concatenated(torch.cat(sums), torch.cat(tokens))))


def shrunk(shift: Tensor, standard_error: Tensor) -> Tensor:
    """Returns what data can support of a shift: ``1 - (standard error / shift)²`` of it, or 0 if that is negative."""
    noise = (standard_error / shift).square()
    return torch.where(noise < 1, shift * (1 - noise), 0)
