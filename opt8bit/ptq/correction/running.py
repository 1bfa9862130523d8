"""Means and medians of output errors, kept up to date while batches come in, with how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opt8bit.ptq.correction.bias import CHANNELS, ratio_error

Shape = Sequence[int]


class RunningMean:
    """Keeps the mean error over tokens, channel by channel, and its standard error.

    Samples are independent of each other, and the tokens of one sample are not. With the sum s and the number n of
    tokens of each sample, the mean is ``m = Σ s / Σ n``, and the standard error follows from ``Σ (s - n m)²``. Six sums
    in float64 say both, so that any division into batches gives the same result up to rounding.

    Args:
        shape: of the channels.
        device: of the sums.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        def zeros() -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.tokens, self.samples = zeros(), zeros()  # Σ n, and how many samples have n > 0
        self.sums, self.squares = zeros(), zeros()  # Σ s, Σ s²
        self.products, self.tokens_squared = zeros(), zeros()  # Σ n s, Σ n²

    def add(
        self,
        sums: Tensor,  # (samples, *channels), over the tokens of each sample
        tokens: Tensor,  # (samples, *channels), or what broadcasts to it
    ) -> None:
        """Adds the sums of further samples."""
        sums = sums.to(self.sums)
        tokens = tokens.to(self.sums).expand_as(sums)
        self.sums += sums.sum(0)
        self.squares += sums.square().sum(0)
        self.tokens += tokens.sum(0)
        self.tokens_squared += tokens.square().sum(0)
        self.products += (tokens * sums).sum(0)
        self.samples += (tokens > 0).sum(0)

    def shift(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and its standard error, both (*channels).

        The mean is 0 where no token counts. The standard error is infinite where fewer than two samples do.
        """
        mean = self.sums / self.tokens.clamp(min=1)
        squares = self.squares - 2 * mean * self.products + mean.square() * self.tokens_squared
        error = ratio_error(squares.clamp(min=0), self.samples, self.tokens)
        return mean, torch.where(self.samples > 1, error, torch.inf)


class RunningMedian:
    """Keeps the median error over tokens, channel by channel: the constant of least absolute error.

    All errors are kept, and the median is exact, until they take ``max_bytes``. From then on they are thinned out:
    of the most numerous errors of one weight w, sorted, every second one is kept with the weight 2 w. Each such step
    moves the rank of a value by at most w. The sum of these steps bounds how far the result is from the median.

    Args:
        shape: of the channels.
        device: of the errors.
        max_bytes: that the errors may take.

    Source of the sketch: Manku, Rajagopalan, Lindsay: Approximate Medians and other Quantiles in One Pass (1998).
    """

    def __init__(self, shape: Shape, device: torch.device, max_bytes: int) -> None:
        self.shape, self.max_bytes = tuple(shape), max_bytes
        self.levels: list[list[Tensor]] = [[]]  # errors (n, channels) of weight 1, 2, 4 ..., NaN where none counts
        self.medians = RunningMean(shape, device)  # of the samples' own medians
        self.tokens = torch.zeros(self.medians.tokens.numel(), dtype=torch.float64, device=device)
        self._moved = 0  # by how much ranks may have been moved
        self._thinned = 0  # how often

    def add(
        self,
        errors: Tensor,  # (samples, tokens, *channels), NaN where one does not count
    ) -> None:
        """Adds the errors of further samples."""
        if not errors.numel():
            return
        medians = errors.nanmedian(1).values
        counts = ~medians.isnan()
        self.medians.add(torch.where(counts, medians, 0), counts)
        rows = errors.flatten(0, 1).flatten(1)
        self.tokens += (~rows.isnan()).sum(0)
        self.levels[0].append(rows)
        while self._bytes() > self.max_bytes and self._thin_out():
            pass

    @property
    def rank_error(self) -> float:
        """The most that the result's rank may be off 1/2, as a fraction of the tokens; 0 where it is exact."""
        if not self._moved:
            return 0.0
        # Ranks move by at most the sum of the weights. Where masks leave channels with unlike numbers of errors, the
        # total that is halved to find the median moves by as much.
        return min(1.0, 1.5 * self._moved / max(1.0, float(self.tokens.min())))

    def shift(self) -> tuple[Tensor, Tensor]:
        """Returns the median and its standard error, both (*channels); the median is 0 where no token counts.

        The standard error says how much the samples' own medians differ. It is infinite for fewer than two samples.
        """
        rows = torch.cat([part for level in self.levels for part in level])
        counts = [sum(len(part) for part in level) for level in self.levels]
        weights = torch.cat([rows.new_full((n,), 2.0**i, dtype=torch.float64) for i, n in enumerate(counts)])
        exact = len(self.levels) == 1
        parts = rows.split(CHANNELS, 1)
        found = [part.nanmedian(0).values if exact else _weighted_median(part, weights) for part in parts]
        return torch.cat(found).nan_to_num(0.0).reshape(self.shape), self.medians.shift()[1]

    def _bytes(self) -> int:
        return sum(part.numel() * part.element_size() for level in self.levels for part in level)

    def _thin_out(self) -> bool:
        """Halves the longest level; returns whether there was anything to halve."""
        lengths = [sum(len(part) for part in level) for level in self.levels]
        longest = lengths.index(max(lengths))
        pairs = lengths[longest] // 2
        if not pairs:
            return False
        rows = torch.cat(self.levels[longest])
        kept, rest = [], []
        for part in rows.split(CHANNELS, 1):
            ordered = part.sort(0).values
            # In turn the lower and the upper of each pair, so that what one step moves the next one moves back.
            kept.append(ordered[self._thinned % 2 : 2 * pairs : 2])
            rest.append(ordered[2 * pairs :])
        if longest + 1 == len(self.levels):
            self.levels.append([])
        self.levels[longest] = [torch.cat(rest, 1)]
        self.levels[longest + 1].append(torch.cat(kept, 1))
        self._moved += 2**longest
        self._thinned += 1
        return True


def _weighted_median(
    rows: Tensor,  # (n, channels), NaN where one does not count
    weights: Tensor,  # (n,)
) -> Tensor:
    """Returns the least value at or below which lies half of the weight, (channels,); NaN where there is none."""
    ordered, order = rows.sort(0)  # NaN comes last
    sums = torch.where(ordered.isnan(), 0, weights[order]).cumsum(0)
    at = torch.searchsorted(sums.T.contiguous(), (sums[-1:] / 2).T.contiguous())  # (channels, 1)
    return ordered.gather(0, at.T.clamp(max=len(rows) - 1))[0]
