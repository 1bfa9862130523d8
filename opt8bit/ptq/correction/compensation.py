"""BiasCompensation: a module that stands behind any layer and adds what makes up for its mean or median error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.correction.bias import shrunk
from opt8bit.ptq.correction.folding import fold
from opt8bit.ptq.correction.output_errors import axes_of, by_sample, check_output, counted, difference
from opt8bit.ptq.correction.running import RunningMean, RunningMedian
from opt8bit.recipe.arguments import check_one_of
from opt8bit.recipe.corrections import STATISTICS

MAX_BYTES = 2**28  # of errors that a median keeps


class BiasCompensation(nn.Module):
    """Adds a bias to an output: the constant that makes up for what quantization did to it.

    The bias is ``E[y - ŷ]`` over all tokens that count, channel by channel, with y the float output and ŷ the quantized
    one. Of all constants it leaves the least squared error, which falls by exactly the square of the bias. The median
    of ``y - ŷ`` leaves the least absolute error. With ``shrink``, a bias b with the standard error s is multiplied by
    ``max(0, 1 - (s / b)²)``: what few samples cannot support is left out, and a single sample supports nothing.

    Until the first :meth:`update` the bias is 0 and the module is the identity.

    Args:
        channel_size: number of channels, or the size of each dimension that keeps biases of its own. With all
            dimensions but the first, every position has its own bias, as in the paper's vision transformers.
        channel_axis: the dimension of the channels in the output, or one for each size, in increasing order. Negative
            ones count from the back: -1 for the output of ``nn.Linear``, 1 for that of a convolution on batches.
        statistic: "mean" or "median".
        shrink: whether the bias is shrunk to what the samples support.
        max_bytes: of errors that a median keeps. Beyond it the median is that of a sketch, see :attr:`rank_error`.
        device, dtype: of the bias.

    Attributes:
        bias: the parameter that is added, (*channel_size,). It requires no gradient. The state dict holds it and
            nothing else: the sums behind it stay in this object.

    Raises:
        TypeError, ValueError: an argument is not one of the above.

    Example:
        >>> layer, rounded = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> compensation = BiasCompensation(3, -1)
        >>> for x in torch.randn(8, 16, 10, 4):  # batches of 16 samples with 10 tokens each
        ...     compensation.update(layer(x), rounded(x))
        >>> y = compensation(rounded(x))

    Source: Minimize Quantization Output Error with Bias Compensation, https://arxiv.org/abs/2404.01892, equation 6.
    """

    def __init__(
        self,
        channel_size: int | Sequence[int],
        channel_axis: int | Sequence[int],
        *,
        statistic: str = "mean",
        shrink: bool = True,
        max_bytes: int = MAX_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channel_size = _integers("channel_size", channel_size, at_least=1)
        self.channel_axis = _integers("channel_axis", channel_axis)
        if len(self.channel_size) != len(self.channel_axis):
            raise ValueError(f"channel_axis must name one dimension for each size, got {channel_axis}, {channel_size}")
        check_one_of("statistic", statistic, STATISTICS)
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.statistic, self.shrink, self.max_bytes = statistic, shrink, max_bytes
        bias = torch.zeros(self.channel_size, device=device, dtype=dtype)
        if not bias.is_floating_point():
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        self.bias = nn.Parameter(bias, requires_grad=False)
        self._running: RunningMean | RunningMedian | None = None
        self._dims: int | None = None  # of the outputs that it has seen

    @property
    def rank_error(self) -> float:
        """The most that the median's rank may be off 1/2, as a fraction of the tokens; 0 where it is exact."""
        return self._running.rank_error if isinstance(self._running, RunningMedian) else 0.0

    @property
    def standard_error(self) -> Tensor | None:
        """The standard error of the bias before it is shrunk, (*channel_size,), in float64, or None at first."""
        return None if self._running is None else self._running.shift()[1]

    @torch.no_grad()
    def update(
        self,
        float_output: Tensor,
        quantized_output: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Takes a batch into account and sets the bias. Call it any number of times.

        Sums are in float64: any division of the same samples into batches gives the same mean, except for rounding.
        The first dimension counts independent samples, unless it is one of the channels: then a batch is one sample.

        Args:
            float_output: what the unquantized layer puts out, with the channels where ``channel_axis`` says.
            quantized_output: what the quantized layer puts out, of the same shape, without this module's bias.
            mask: true where a token counts. It has the first dimensions of the outputs, such as (samples, length), or
                broadcasts to all of them. None where all count.

        Raises:
            TypeError: an output is no tensor of floating-point numbers.
            ValueError: shapes do not agree; an output that counts is not finite; or the bias was loaded, so that what
                it was computed from is not there. Nothing has changed then.
        """
        self.observe(float_output, quantized_output, mask)
        self.settle()

    @torch.no_grad()
    def observe(self, float_output: Tensor, quantized_output: Tensor, mask: Tensor | None = None) -> None:
        """Takes a batch into account as :meth:`update` does, and leaves the bias to a later :meth:`settle`."""
        shape = check_output("float_output", float_output).shape
        if check_output("quantized_output", quantized_output).shape != shape:
            shapes = f"{tuple(shape)} and {tuple(quantized_output.shape)}"
            raise ValueError(f"float_output and quantized_output must have the same shape, got {shapes}")
        axes = axes_of(shape, self.channel_size, self.channel_axis, "quantized_output")
        counts = None if mask is None else counted(mask.to(quantized_output.device), shape)
        error = difference(float_output, quantized_output, counts)
        running = self._statistics(error.device)
        self._dims = len(shape)
        errors = by_sample(error, axes)
        if isinstance(running, RunningMedian):
            running.add(errors)
        elif counts is None:
            running.add(errors.sum(1, dtype=torch.float64), errors.new_tensor(errors.shape[1]))
        else:
            running.add(errors.nansum(1, dtype=torch.float64), (~errors.isnan()).sum(1))

    @torch.no_grad()
    def observe_sums(self, sums: Tensor, tokens: Tensor, dims: int) -> None:
        """Takes sums of errors over tokens into account, for the mean.

        Args:
            sums: of ``y - ŷ`` over the tokens of each sample, (samples, *channel_size).
            tokens: of each sample, (samples,).
            dims: of the outputs that the errors are of.
        """
        running = self._statistics(sums.device)
        assert isinstance(running, RunningMean)
        running.add(sums, tokens.view(-1, *[1] * len(self.channel_size)))
        self._dims = dims

    @torch.no_grad()
    def settle(self) -> None:
        """Sets the bias to what the batches so far say; without any, it stays as it is."""
        if self._running is not None:
            shift, error = self._running.shift()
            self.bias.copy_(shrunk(shift, error) if self.shrink else shift)

    @torch.no_grad()
    def reset(self) -> None:
        """Makes this the identity again, as it was before the first update."""
        self.bias.zero_()
        self._running = self._dims = None

    def forward(
        self,
        output: Tensor,
    ) -> Tensor:
        """Returns the output plus the bias, in the output's dtype.

        Raises:
            TypeError: it is no tensor of floating-point numbers.
            ValueError: it has other channels.
        """
        axes = axes_of(check_output("output", output).shape, self.channel_size, self.channel_axis, "output")
        shape = [size if i in axes.channels else 1 for i, size in enumerate(output.shape)]
        return output + self.bias.to(output.dtype).view(shape)

    @torch.no_grad()
    def fold_into(self, layer: nn.Module) -> None:
        """Moves the bias into a layer, whose outputs are then what this module made of them; it is the identity after.

        A layer without a bias gets one.

        Args:
            layer: an ``nn.Linear``, transformers' ``Conv1D``, or a convolution, transposed or not, in 1 to 3
                dimensions, which this module stands behind.

        Raises:
            TypeError: it is of another class.
            ValueError: the bias is one by position, or of other channels than the layer's. Nothing has changed then.
        """
        fold(self.bias, layer, self.channel_axis, self._dims)
        self.reset()

    def extra_repr(self) -> str:
        size, axis = (each[0] if len(each) == 1 else each for each in (self.channel_size, self.channel_axis))
        return f"{size}, {axis}, statistic={self.statistic!r}, shrink={self.shrink}"

    def _statistics(self, device: torch.device) -> RunningMean | RunningMedian:
        if self._running is None:
            if bool(self.bias.any()):
                raise ValueError("the bias was loaded, and what it was computed from is not there: call reset() first")
            if self.statistic == "median":
                self._running = RunningMedian(self.channel_size, device, self.max_bytes)
            else:
                self._running = RunningMean(self.channel_size, device)
        return self._running

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._running = self._dims = None  # of another bias


def _integers(name: str, value: int | Sequence[int], at_least: int | None = None) -> tuple[int, ...]:
    given: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence | range) else (value,)
    for each in given:
        if not isinstance(each, int) or isinstance(each, bool) or (at_least is not None and each < at_least):
            least = "" if at_least is None else f" of at least {at_least}"
            raise ValueError(f"{name} must be an integer{least} or a sequence of them, got {value!r}")
    if not given:
        raise ValueError(f"{name} must be an integer or a sequence of them, got {value!r}")
    return given
