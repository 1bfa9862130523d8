"""The few matrices that rounding needs: damping, and the triangular factor of an inverse."""

from __future__ import annotations

import torch
from torch import Tensor

ATTEMPTS = 12  # of tenfold damping: from 1% to beyond any matrix of float64


def cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``H + λI`` and its lower Cholesky factor, with λ the least ``damping * 10^k * mean(diag H)`` that has one.

    A column without any signal (``H_jj = 0``) has no say in the others: its row and column are those of the identity.

    Args:
        hessian: (d, d), symmetric, positive semi-definite up to rounding; float64 is best.
        damping: as a fraction of the mean of the diagonal.

    Raises:
        ValueError: ``hessian`` is not finite or far from positive semi-definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the second moments of the inputs are not finite")
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.clamp(min=0).mean()) or 1.0
    for attempt in range(ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**attempt * mean)
        damped[dead] = 0
        damped[:, dead] = 0
        damped.diagonal()[dead] = mean
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return damped, factor
    raise ValueError("the second moments of the inputs are not those of any data: far from positive semi-definite")


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``H + λI`` as in :func:`cholesky`, and U, upper triangular, with ``UᵀU = (H + λI)⁻¹``.

    With the order of rows and columns reversed, a lower factor is an upper one: ``H = R Rᵀ`` with R upper, so that
    ``U = R⁻¹``. The inverse itself is never formed.
    """
    damped, lower = cholesky(hessian.flip(0, 1), damping)
    upper = lower.flip(0, 1)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return damped.flip(0, 1), torch.linalg.solve_triangular(upper, identity, upper=True)
