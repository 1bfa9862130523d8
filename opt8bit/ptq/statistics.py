"""What calibration keeps of a layer's inputs: sums over tokens, of the float stream and of the quantized one."""

from __future__ import annotations

import torch
from torch import Tensor

TRIANGLE = 192  # columns of one piece of a symmetric product: small enough to leave most of the upper half out


class Statistics:
    """Sums over the tokens that one layer has seen: x in the float model, x̂ in the model quantized so far.

    Both streams see the same tokens in the same order. A batch is multiplied in the streams' own dtype and added
    in ``dtype``, so that batches of any size come to the same sums up to rounding. Means are kept per sequence: how
    much they differ says how far the mean of all tokens can be trusted.

    Args:
        features: length d of an input.
        dtype: of the sums: float64 or float32.
        device: of the sums.

    Raises:
        ValueError: ``dtype`` is another one.
    """

    def __init__(
        self, features: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        square = (features, features)
        self.tokens = torch.zeros(0, dtype=dtype, device=device)  # (sequences,)
        self.sum_x = torch.zeros(0, features, dtype=dtype, device=device)  # (sequences, d)
        self.sum_x_hat = torch.zeros(0, features, dtype=dtype, device=device)  # (sequences, d)
        self.sum_xx = torch.zeros(square, dtype=dtype, device=device)  # Σ x xᵀ
        self.sum_cross = torch.zeros(square, dtype=dtype, device=device)  # Σ x x̂ᵀ
        self.sum_x_hat_x_hat = torch.zeros(square, dtype=dtype, device=device)  # Σ x̂ x̂ᵀ

    @property
    def count(self) -> Tensor:
        """Tokens seen, ()."""
        return self.tokens.sum()

    def update(
        self,
        x: Tensor,  # (sequences, length, d)
        x_hat: Tensor,  # (sequences, length, d)
        mask: Tensor | None = None,  # (sequences, length), true where a token counts
    ) -> None:
        """Adds a batch.

        Raises:
            ValueError: the shapes do not agree, or an input that counts is not finite.
        """
        if x.dim() != 3 or x.shape != x_hat.shape or x.shape[-1] != self.sum_xx.shape[0]:
            expected = f"(sequences, length, {self.sum_xx.shape[0]})"
            raise ValueError(f"x and x_hat must both be {expected}, got {tuple(x.shape)} and {tuple(x_hat.shape)}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask must be {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
        tokens = torch.full(x.shape[:1], x.shape[1], device=x.device)
        if mask is not None:
            counts = mask.bool().unsqueeze(-1)
            tokens = counts.sum((1, 2))
            # Not a product: what does not count may be infinite.
            x, x_hat = torch.where(counts, x, 0), torch.where(counts, x_hat, 0)
        sum_x, sum_x_hat = (stream.sum(1, dtype=self.sum_x.dtype) for stream in (x, x_hat))
        if not bool((sum_x.isfinite() & sum_x_hat.isfinite()).all()):
            raise ValueError("an input is not finite")
        self.tokens = torch.cat([self.tokens, tokens.to(self.tokens)])
        self.sum_x = torch.cat([self.sum_x, sum_x])
        self.sum_x_hat = torch.cat([self.sum_x_hat, sum_x_hat])
        rows, rows_hat = x.flatten(0, 1), x_hat.flatten(0, 1)
        self.sum_xx += gram(rows)
        self.sum_cross += rows.T @ rows_hat
        self.sum_x_hat_x_hat += gram(rows_hat)

    def merge(self, other: Statistics) -> None:
        """Adds what another one has seen of other tokens."""
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.sum_x = torch.cat([self.sum_x, other.sum_x])
        self.sum_x_hat = torch.cat([self.sum_x_hat, other.sum_x_hat])
        self.sum_xx += other.sum_xx
        self.sum_cross += other.sum_cross
        self.sum_x_hat_x_hat += other.sum_x_hat_x_hat

    @property
    def mean_x(self) -> Tensor:
        """E[x], (d,)."""
        return self.sum_x.sum(0) / self.count

    @property
    def mean_x_hat(self) -> Tensor:
        """E[x̂], (d,)."""
        return self.sum_x_hat.sum(0) / self.count


class Moments:
    """Second moments per token, (d, d), about zero or about the means."""

    def __init__(self, statistics: Statistics, *, centred: bool) -> None:
        count = statistics.count
        self.xx = statistics.sum_xx / count  # E[x xᵀ]
        self.cross = statistics.sum_cross / count  # E[x x̂ᵀ]
        self.x_hat_x_hat = statistics.sum_x_hat_x_hat / count  # E[x̂ x̂ᵀ]
        if centred:
            mean, mean_hat = statistics.mean_x, statistics.mean_x_hat
            self.xx = self.xx - torch.outer(mean, mean)
            self.cross = self.cross - torch.outer(mean, mean_hat)
            self.x_hat_x_hat = self.x_hat_x_hat - torch.outer(mean_hat, mean_hat)


def gram(rows: Tensor) -> Tensor:
    """``rowsᵀ rows`` of rows (n, d), with only the pieces on and below the diagonal computed."""
    features = rows.shape[1]
    product = rows.new_empty(features, features)
    for top in range(0, features, TRIANGLE):
        piece = rows[:, top : top + TRIANGLE].T @ rows[:, : top + TRIANGLE]
        product[top : top + TRIANGLE, : top + TRIANGLE] = piece
        product[:top, top : top + TRIANGLE] = piece[:, :top].T
    return product
