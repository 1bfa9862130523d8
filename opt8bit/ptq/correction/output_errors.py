"""The error of a quantized output, laid out by sample, token and channel."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Axes(NamedTuple):
    """Says which dimensions of an output the channels are.

    Attributes:
        channels: dimensions that keep a bias of their own each, counted from the front, in increasing order.
        sample: the dimension of independent samples; None where the first one holds channels.
        tokens: all other dimensions.
    """

    channels: tuple[int, ...]
    sample: int | None
    tokens: tuple[int, ...]


def axes_of(shape: torch.Size, size: tuple[int, ...], axis: tuple[int, ...], name: str) -> Axes:
    """Finds the channels of an output.

    Args:
        shape: of the output.
        size: of each channel dimension.
        axis: of each channel dimension, from the front or, negative, from the back.
        name: of the output, for messages.

    Raises:
        ValueError: the output has no such dimensions, or other sizes there.
    """
    dims = len(shape)
    channels = tuple(each + dims if each < 0 else each for each in axis)
    fits = all(0 <= each < dims for each in channels)
    if not fits or any(after <= before for before, after in itertools.pairwise(channels)):
        raise ValueError(f"channel_axis must name dimensions of {name} {tuple(shape)} in order, got {axis}")
    found = tuple(shape[each] for each in channels)
    if found != size:
        raise ValueError(f"{name} must have {size} channels in dimensions {axis}, got {found} of {tuple(shape)}")
    sample = None if 0 in channels else 0
    return Axes(channels, sample, tuple(each for each in range(dims) if each not in (*channels, sample)))


def check_output(name: str, output: Any) -> Tensor:
    """
    Raises:
        TypeError: an output is no tensor of floating-point numbers.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(output).__name__}: pass the tensor that is in it")
    if output.is_quantized or not output.is_floating_point():
        raise TypeError(f"{name} must be of floating-point numbers, got {output.dtype}")
    return output


def counted(mask: Tensor, shape: torch.Size) -> Tensor:
    """Returns the mask of what counts, as a view in the output's shape.

    Args:
        mask: true where a token counts: it has the output's leading dimensions, or broadcasts to all of them.
        shape: of the output.

    Raises:
        ValueError: it does neither.
    """
    view = mask.bool()
    if mask.dim() < len(shape) and mask.shape == shape[: mask.dim()]:
        view = view.reshape(*mask.shape, *[1] * (len(shape) - mask.dim()))
    if view.dim() != len(shape) or any(have not in (1, want) for have, want in zip(view.shape, shape, strict=True)):
        allowed = f"have the first dimensions of the outputs, or broadcast to {tuple(shape)}"
        raise ValueError(f"mask must {allowed}, got {tuple(mask.shape)}")
    return view.expand(shape)


def difference(float_output: Tensor, quantized_output: Tensor, counts: Tensor | None) -> Tensor:
    """Returns the float output minus the quantized one, in float32 or float64; NaN where a token does not count.

    Raises:
        ValueError: an output that counts is not finite; it names the output, the place and the value.
    """
    dtype = torch.promote_types(torch.promote_types(float_output.dtype, quantized_output.dtype), torch.float32)
    error = float_output.to(quantized_output.device, dtype) - quantized_output.to(dtype)
    if counts is None and _adds_up(error):
        return error
    finite = error.isfinite() if counts is None else error.isfinite() | ~counts
    if not bool(finite.all()):
        for name, output in (("float_output", float_output), ("quantized_output", quantized_output)):
            check_finite(name, output, counts)
        raise ValueError(f"float_output - quantized_output is beyond the range of {dtype}")
    return error if counts is None else torch.where(counts, error, torch.nan)


def _adds_up(output: Tensor) -> bool:
    """Tells whether the sum is finite, and so every value. To ask each takes many times as long."""
    return math.isfinite(output.sum().item())


def check_finite(name: str, output: Tensor, counts: Tensor | None = None) -> None:
    """
    Raises:
        ValueError: a value that counts is not finite.
    """
    if counts is None and _adds_up(output):
        return
    wrong = ~output.isfinite() if counts is None else ~output.isfinite() & counts.to(output.device)
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(output[place])} at {list(place)}")


def by_sample(error: Tensor, axes: Axes) -> Tensor:
    """Returns the error as (samples, tokens, *channels)."""
    sample = () if axes.sample is None else (axes.sample,)
    ordered = error.permute(*sample, *axes.tokens, *axes.channels)
    sizes = [error.shape[i] for i in axes.channels]
    samples = 1 if axes.sample is None else error.shape[0]
    tokens = torch.Size(error.shape[i] for i in axes.tokens).numel()
    return ordered.reshape(samples, tokens, *sizes)
