"""The error of one module's output, collected over batches, and the bias that makes up for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.ptq.correction.compensation import BiasCompensation
from opt8bit.ptq.correction.folding import image_dims
from opt8bit.ptq.correction.output_errors import check_finite, check_output
from opt8bit.ptq.correction.placing import Behind, InBias, Placed, takes_bias
from opt8bit.ptq.model.blocks import is_linear
from opt8bit.ptq.pairs.batches import Target, mask_for, moved
from opt8bit.ptq.pairs.matching import Pair
from opt8bit.ptq.pairs.outputs import Element, element_of, with_element

CLOSE = 0.02  # of the error of a mean, within which a layer tells it from its mean input
TRIED = 4  # images or rows, on which it is found out whether it does
TRIED_TOKENS = 32  # of a sample: less than twice as many, evenly spaced, as padding is all at one end
KEPT_NUMBERS = 2**18  # in mean inputs, until the quantized module is called with them


class Mismatch(ValueError):
    """Raised where two modules of one name do not do the same."""


@dataclass(frozen=True)
class Options:
    """Says what a correction does with every module.

    Attributes:
        statistic, shrink, max_bytes: as of :class:`BiasCompensation`.
        element: of outputs that are no tensors.
        target: what activations of the float model become in the quantized one; None for what they are.
        unit: samples of a convolution, or rows, that go into one mean input.
    """

    statistic: str
    shrink: bool
    max_bytes: int
    element: Element
    target: Target | None
    unit: int


class Means(NamedTuple):
    """Holds inputs and outputs summed over units: the tokens of a sample, several rows, or several images."""

    x: Tensor  # (units, ...): the mean input of a unit
    y: Tensor  # (units, channels): the sum of its outputs
    tokens: Tensor  # (units,)


class LayerError:
    """Collects what a module of a quantized model puts out wrong.

    Args:
        pair: the module and its counterpart in the float model.
        options: of the correction.
    """

    def __init__(self, pair: Pair, options: Options) -> None:
        self.pair, self.options = pair, options
        self.compensation: BiasCompensation | None = None
        self.read = partial(element_of, element=options.element, name=pair.title)
        self.write = partial(with_element, element=options.element)
        self.is_matched = True
        self._in_bias = False
        self._dtype, self._dims = torch.float32, 0  # of the outputs
        self._is_affine: bool | None = None
        self._kept: list[Means] = []

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, mask: Tensor | None) -> None:
        """Takes a call of the float module into account: the quantized one is called with the same.

        Where the module's output is affine in its input, the mean input says the mean error. Then the quantized module
        sees nothing but means, which are far fewer.
        """
        y = check_output(f"the output of {self.pair.title}", self.read(output))
        if not y.numel():  # an expert without a token
            return
        target = self.options.target
        arguments = (args, kwargs) if target is None else (moved(args, target), moved(kwargs, target))
        mask = mask_for(mask, y, self.pair.channel_axis)
        if self.compensation is None:
            self.begin(y, arguments)
        x = arguments[0][0] if len(arguments[0]) == 1 and not arguments[1] else None
        if self._is_affine is not False and isinstance(x, Tensor):
            means = self._means(x, y, mask)
            if self._is_affine is None:
                self._is_affine = means is not None and self._tells(x, y)
            if means is not None and self._is_affine:
                self._keep(means, x.dtype, y.dim())
                return
        self.compare(y, self.pair.quantized(*arguments[0], **arguments[1]), mask)

    def begin(self, y: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Finds out the channels, and what place there is for a bias.

        Args:
            y: an output of the float module.
            arguments: of the quantized one.
        """
        axis = self.pair.channel_axis
        if not -y.dim() <= axis < 0:
            raise ValueError(f"channel_axis must be from {-y.dim()} to -1 for outputs {tuple(y.shape)}, got {axis}")
        args, kwargs = arguments
        if len(args) == 1 and not kwargs and self._is_of_tokens(args[0], y):
            args = (_spaced(args[0]),)
        self._in_bias = takes_bias(self.pair.quantized, (args, kwargs), self.read, axis)
        self._dtype = y.dtype if self.options.target is None else self.options.target.dtype or y.dtype
        self.compensation = BiasCompensation(
            y.shape[axis],
            axis,
            statistic=self.options.statistic,
            shrink=self.options.shrink,
            max_bytes=self.options.max_bytes,
            device=y.device if self.options.target is None else self.options.target.device,
            dtype=torch.promote_types(self._dtype, torch.float32),
        )

    def compare(self, output: Any, output_hat: Any, mask: Tensor | None) -> None:
        """Takes outputs of both modules into account.

        Args:
            output, output_hat: of the float module and the quantized one.
            mask: in the form of the output.

        Raises:
            Mismatch: the outputs differ in shape.
        """
        y, y_hat = self.read(output), self.read(output_hat)
        if y.shape != y_hat.shape:
            raise self._mismatch(f"its output has shape {tuple(y_hat.shape)}, the reference's {tuple(y.shape)}")
        assert self.compensation is not None
        self.compensation.observe(y, y_hat, mask)

    def corrected(self, output_hat: Any) -> Any:
        """Returns an output of the quantized module with the correction so far."""
        if self.compensation is None or not self.is_matched:
            return output_hat
        return self.write(output_hat, self.compensation(self.read(output_hat)))

    def settle(self) -> None:
        """Sets the bias to what the batches so far say.

        Raises:
            ValueError: an output is not finite.
        """
        if self.compensation is not None:
            self._take_in()
            self.compensation.settle()

    def placed(self) -> Placed | None:
        """Returns the correction in its place, not put there yet, or None where there is nothing to correct."""
        if self.compensation is None or not self.is_matched or not bool(self.compensation.bias.any()):
            return None
        if self._in_bias:
            return InBias(self.pair.quantized, self.compensation.bias.detach(), self._dtype)
        final = BiasCompensation(
            self.compensation.channel_size,
            self.compensation.channel_axis,
            statistic=self.options.statistic,
            shrink=self.options.shrink,
            device=self.compensation.bias.device,
            dtype=self._dtype,
        )
        final.bias.copy_(self.compensation.bias)
        return Behind(self.pair.quantized, final, self.read, self.write)

    def _mismatch(self, why: str) -> Mismatch:
        self.is_matched = False
        return Mismatch(why)

    def _means(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Means | None:
        """Returns the means of a call, or None where they do not say the mean error or save nothing."""
        if self.options.statistic != "mean":
            return None
        images = image_dims(self.pair.reference)
        if images is not None and x.dim() == images + 2:
            return _means_of_images(x, y, self.options.unit) if self.options.unit > 1 else None
        if self._is_of_tokens(x, y):
            return _means_of_samples(x, y, mask)
        are_rows = is_linear(self.pair.reference) and x.dim() == 2 and len(x) == len(y)
        return _means_of_rows(x, y, mask, self.options.unit) if are_rows and self.options.unit > 1 else None

    def _is_of_tokens(self, x: Any, y: Tensor) -> bool:
        """Tells whether the module is a linear layer, called with samples of tokens each."""
        return is_linear(self.pair.reference) and isinstance(x, Tensor) and x.dim() > 2 and x.shape[:-1] == y.shape[:-1]

    def _tells(self, x: Tensor, y: Tensor) -> bool:
        """Tells whether the quantized module makes of the mean of a few inputs what it makes of them, on the average.

        A module that rounds its inputs does not: the error of a mean input is not the mean of their errors.
        """
        unit = slice(min(self.options.unit, TRIED))
        x, y = (_spaced(x), _spaced(y)) if self._is_of_tokens(x, y) else (x[unit], y[unit])
        means = self._means(x, y, None)
        assert means is not None
        axis = self.pair.channel_axis
        rows = _channels_last(self.read(self.pair.quantized(x)), axis)
        of_mean = _channels_last(self.read(self.pair.quantized(means.x.to(x.dtype))), axis).mean(0)
        if len(of_mean) != means.y.shape[1]:
            raise self._mismatch(f"it has {len(of_mean)} channels, the reference's {means.y.shape[1]}")
        error = (means.y[0] / means.tokens[0]).to(rows) - rows.mean(0)
        rounding = torch.finfo(rows.dtype).eps * rows.square().mean(0).sum().sqrt()
        return bool((rows.mean(0) - of_mean).norm() <= CLOSE * error.norm() + 2 * rounding)

    def _keep(self, means: Means, dtype: torch.dtype, dims: int) -> None:
        """Keeps the means of a call: one call of the quantized module for those of many batches takes less time."""
        if self._kept and self._kept[0].x.shape[1:] != means.x.shape[1:]:
            self._take_in()
        self._kept.append(means._replace(x=means.x.to(dtype)))
        self._dims = dims
        if sum(each.x.numel() for each in self._kept) >= KEPT_NUMBERS:
            self._take_in()

    def _take_in(self) -> None:
        """Calls the quantized module with the means that are kept."""
        if not self._kept:
            return
        assert self.compensation is not None
        x, y, tokens = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        self._kept.clear()
        y_hat = self.read(self.pair.quantized(x))
        rows = _channels_last(y_hat, self.pair.channel_axis).unflatten(0, (len(x), -1)).mean(1)  # (units, channels)
        check_finite("the float output", y)
        check_finite("the quantized output", rows)
        sums = y.to(rows.device, torch.float64) - tokens.to(rows.device)[:, None] * rows.to(torch.float64)
        self.compensation.observe_sums(sums, tokens, self._dims)


def _spaced(x: Tensor) -> Tensor:
    """Returns a few tokens of the first sample, (1, tokens, features)."""
    tokens = x[:1].flatten(1, -2)
    return tokens[:, :: max(1, tokens.shape[1] // TRIED_TOKENS)]


def _means_of_samples(x: Tensor, y: Tensor, mask: Tensor | None) -> Means:
    """Sums over the tokens of each sample, as a linear layer acts only on the last dimension."""
    x, y = x.flatten(1, -2), y.flatten(1, -2)  # (samples, tokens, features)
    tokens = torch.full((len(x),), x.shape[1], device=x.device)
    if mask is not None:
        counts = mask.flatten(1)
        tokens = counts.sum(1)
        x, y = (torch.where(counts.to(each.device)[..., None], each, 0) for each in (x, y))
    return Means(_sum(x, 1) / tokens.clamp(min=1)[:, None], _sum(y, 1), tokens)


def _means_of_rows(x: Tensor, y: Tensor, mask: Tensor | None, unit: int) -> Means:
    """Sums over several rows each."""
    counts = torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask
    if mask is not None:
        x, y = (torch.where(counts.to(each.device)[:, None], each, 0) for each in (x, y))
    tokens = _unit_sums(counts, unit)
    return Means(_unit_sums(x, unit) / tokens.clamp(min=1)[:, None], _unit_sums(y, unit), tokens)


def _means_of_images(x: Tensor, y: Tensor, unit: int) -> Means:
    """Sums over several images each. Positions stay apart: at the edge, padding makes a layer do something else."""
    images = torch.full((-(-len(x) // unit),), unit, device=x.device)
    images[-1:] = len(x) - unit * (len(images) - 1)  # the last ones may be fewer
    means = _unit_sums(x, unit) / images.view(-1, *[1] * (x.dim() - 1))
    return Means(means, _unit_sums(_sum(y.flatten(2), 2), unit), images * y.shape[2:].numel())


def _unit_sums(x: Tensor, unit: int) -> Tensor:
    """Returns sums over ``unit`` rows each, (units, ...); the last ones may be fewer."""
    full, rest = divmod(len(x), unit)
    if not rest:
        return _sum(x.unflatten(0, (full, unit)), 1)
    end = full * unit
    return torch.cat([_unit_sums(x[:end], unit), _sum(x[end:], 0)[None]])


def _sum(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sums in at least float32; counts stay integers."""
    return x.sum(dim, dtype=torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.int64)


def _channels_last(y: Tensor, channel_axis: int) -> Tensor:
    """Returns an output as (tokens, channels)."""
    return y.movedim(channel_axis, -1).flatten(0, -2)
