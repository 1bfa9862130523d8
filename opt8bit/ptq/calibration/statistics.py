"""Sums what calibration keeps of a layer's inputs over tokens, in the float and the quantized stream."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from opt8bit.ptq import ranks

TRIANGLE = 192  # columns of one piece of a symmetric product: small enough to leave most of the upper half out


class Inputs(NamedTuple):
    """Holds what a layer sees of one batch, in the float model and in the one that is quantized so far."""

    x: Tensor  # (sequences, length, d)
    x_hat: Tensor  # (sequences, length, d)
    mask: Tensor | None = None  # (sequences, length), true where a token counts
    wanted: Tensor | None = None  # (sequences, length, h), of a layer whose output is added to the hidden states:
    # W x + δ, what it puts out in the float model, without its bias, and by how much the hidden states have drifted
    weights: Tensor | None = None  # (sequences, length), of the tokens; None where all that count weigh 1

    def to(self, dtype: torch.dtype) -> Inputs:
        wanted = None if self.wanted is None else self.wanted.to(dtype)
        return self._replace(x=self.x.to(dtype), x_hat=self.x_hat.to(dtype), wanted=wanted)


class NotFinite(ValueError):
    """An input of a layer is not finite."""


class Statistics:
    """Sums over the tokens that one layer has seen: x in the float model, x̂ in the model quantized so far.

    Both streams see the same tokens in the same order. Where tokens have weights, all sums are weighted, and so is the
    number of tokens. A batch is multiplied, and the tokens of a sequence are added,
    in the streams' own dtype, all else in ``dtype``, so that batches of any size come to the same sums up to rounding.
    Means are kept per sequence: how much they differ says how far the mean of all tokens can be trusted. Sums that are
    not asked for stay empty.

    Args:
        features: length d of an input.
        hessian: whether ``Σ x̂ x̂ᵀ`` is kept. (Where both streams are one, that is ``Σ x xᵀ``.)
        cross: whether ``Σ x x̂ᵀ`` is kept, or with ``wanted`` in its place ``Σ y x̂ᵀ``, y what the layer should put out.
        wanted: length h of y; 0 for none.
        dtype: of the sums: float64 or float32.
        device: of the sums.

    Raises:
        ValueError: ``dtype`` is another one.
    """

    def __init__(
        self,
        features: int,
        *,
        hessian: bool = True,
        cross: bool = True,
        wanted: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")

        def zeros(*shape: int, kept: bool = True) -> Tensor:
            return torch.zeros(shape if kept else (0, 0), dtype=dtype, device=device)

        self.tokens = zeros(0)  # (sequences,)
        self.sum_x = zeros(0, features)  # (sequences, d)
        self.sum_x_hat = zeros(0, features)  # (sequences, d)
        self.sum_wanted = zeros(0, wanted)  # (sequences, h)
        self.sum_x_hat_x_hat = zeros(features, features, kept=hessian)  # Σ x̂ x̂ᵀ
        self.sum_cross = zeros(wanted or features, features, kept=cross)  # Σ x x̂ᵀ, or Σ y x̂ᵀ

    @property
    def count(self) -> Tensor:
        """The number of tokens seen, or the sum of their weights, ()."""
        return self.tokens.sum()

    def update(
        self,
        x: Tensor,  # (sequences, length, d)
        x_hat: Tensor,  # (sequences, length, d)
        mask: Tensor | None = None,  # (sequences, length), true where a token counts
        wanted: Tensor | None = None,  # (sequences, length, h)
        weights: Tensor | None = None,  # (sequences, length)
    ) -> None:
        """Adds a batch of :class:`Inputs`.

        Raises:
            ValueError: the shapes do not agree, or an input that counts is not finite.
        """
        self._check(x, x_hat, mask, wanted, weights)
        tokens = torch.full(x.shape[:1], x.shape[1], device=x.device)
        streams = [x, x_hat, x[..., :0] if wanted is None else wanted]
        if mask is not None:
            counts = mask.bool().unsqueeze(-1)
            tokens = counts.sum((1, 2))
            # Not a product: what does not count may be infinite.
            streams = [torch.where(counts, stream, 0) for stream in streams]
        roots = None
        if weights is not None:
            tokens = (weights if mask is None else torch.where(mask.bool(), weights, 0)).sum(1)
            roots = weights.sqrt().to(x.dtype).unsqueeze(-1)
            streams = [stream * roots for stream in streams]
        sums = [(stream if roots is None else stream * roots).sum(1).to(self.sum_x.dtype) for stream in streams]
        if not all(bool(part.isfinite().all()) for part in sums):
            raise NotFinite("an input is not finite")
        self.tokens = torch.cat([self.tokens, tokens.to(self.tokens)])
        self.sum_x = torch.cat([self.sum_x, sums[0]])
        self.sum_x_hat = torch.cat([self.sum_x_hat, sums[1]])
        self.sum_wanted = torch.cat([self.sum_wanted, sums[2]])
        if self.sum_x_hat_x_hat.numel() or self.sum_cross.numel():
            rows, rows_hat, rows_wanted = (stream.flatten(0, 1) for stream in streams)
            by_feature = rows_hat.T.contiguous()
            if self.sum_x_hat_x_hat.numel():
                add_gram(self.sum_x_hat_x_hat, by_feature)
            if self.sum_cross.numel():
                self.sum_cross += linear((rows if wanted is None else rows_wanted).T, by_feature)  # rowsᵀ rows_hat

    def _check(
        self, x: Tensor, x_hat: Tensor, mask: Tensor | None, wanted: Tensor | None, weights: Tensor | None
    ) -> None:
        features, outputs = self.sum_x.shape[1], self.sum_wanted.shape[1]
        if x.dim() != 3 or x.shape != x_hat.shape or x.shape[-1] != features:
            expected = f"(sequences, length, {features})"
            raise ValueError(f"x and x_hat must both be {expected}, got {tuple(x.shape)} and {tuple(x_hat.shape)}")
        for name, of_tokens in (("mask", mask), ("weights", weights)):
            if of_tokens is not None and of_tokens.shape != x.shape[:2]:
                raise ValueError(f"{name} must be {tuple(x.shape[:2])}, got {tuple(of_tokens.shape)}")
        found = None if wanted is None else tuple(wanted.shape)
        expected = (*x.shape[:2], outputs) if outputs else None
        if found != expected:
            raise ValueError(f"wanted must be {expected}, got {found}")

    def merge(self, other: Statistics) -> None:
        """Adds what another one, of the same sums, has seen of other tokens."""
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.sum_x = torch.cat([self.sum_x, other.sum_x])
        self.sum_x_hat = torch.cat([self.sum_x_hat, other.sum_x_hat])
        self.sum_wanted = torch.cat([self.sum_wanted, other.sum_wanted])
        self.sum_x_hat_x_hat += other.sum_x_hat_x_hat
        self.sum_cross += other.sum_cross

    def take_squares(self) -> tuple[Tensor, Tensor]:
        """Hands over ``Σ x̂ x̂ᵀ`` and the cross sum for the caller to change; none are kept from now on."""
        taken = self.sum_x_hat_x_hat, self.sum_cross
        self.sum_x_hat_x_hat, self.sum_cross = (square.new_zeros(0, 0) for square in taken)
        return taken

    def of_all_ranks(self) -> None:
        """Adds what all other processes have seen, if there are several."""
        ranks.add(self.sum_x_hat_x_hat, self.sum_cross)
        self.tokens, self.sum_x, self.sum_x_hat, self.sum_wanted = ranks.concatenated(
            self.tokens, self.sum_x, self.sum_x_hat, self.sum_wanted
        )

    @property
    def mean_x(self) -> Tensor:
        """The mean E[x], (d,)."""
        return self.sum_x.sum(0) / self.count

    @property
    def mean_x_hat(self) -> Tensor:
        """The mean E[x̂], (d,)."""
        return self.sum_x_hat.sum(0) / self.count

    @property
    def mean_wanted(self) -> Tensor:
        """The mean E[y], (h,)."""
        return self.sum_wanted.sum(0) / self.count


class InputStatistics(NamedTuple):
    """Holds what a rounding method may ask of a layer's inputs in the compressed model; None where it is not known."""

    second_moments: Tensor | None = (
        None  # E[x̂ x̂ᵀ], (in, in), symmetric, positive semi-definite; of what is centred: Cov
    )

    def required(self, name: str) -> Tensor:
        """
        Raises:
            ValueError: it is not known.
        """
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise ValueError(f"{name} of the layer's inputs must be given, got None")
        return found


class Moments:
    """Holds second moments per token, (d, d) or (h, d), about zero until centred; empty where their sums are.

    They are made in the memory of the sums, which of a wide layer is the most that there is: the statistics have none
    from then on.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._mean_x_hat = statistics.mean_x_hat
        self.are_wanted = statistics.sum_wanted.shape[1] > 0
        self._mean = statistics.mean_wanted if self.are_wanted else statistics.mean_x
        second, cross = statistics.take_squares()
        self.x_hat_x_hat = second.div_(statistics.count)  # E[x̂ x̂ᵀ]
        self.cross = cross.div_(statistics.count)  # E[x x̂ᵀ], or E[y x̂ᵀ]

    def centre(self) -> None:
        """Makes these the moments about the means, in place."""
        if self.x_hat_x_hat.numel():
            self.x_hat_x_hat -= torch.outer(self._mean_x_hat, self._mean_x_hat)
        if self.cross.numel():
            self.cross -= torch.outer(self._mean, self._mean_x_hat)


def add_gram(total: Tensor, by_feature: Tensor) -> None:
    """Adds ``A Aᵀ`` of a matrix (d, n), with only the pieces on and below the diagonal computed."""
    for top in range(0, len(by_feature), TRIANGLE):
        piece = linear(by_feature[top : top + TRIANGLE], by_feature[: top + TRIANGLE])
        total[top : top + TRIANGLE, : top + TRIANGLE] += piece
        total[:top, top : top + TRIANGLE] += piece[:, :top].T
