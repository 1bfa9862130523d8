"""The few matrices that rounding needs: damping, and the triangular factor of an inverse."""

from __future__ import annotations

import torch
from torch import Tensor

ATTEMPTS = 12  # of tenfold damping: from 1% to beyond any matrix of float64


def cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Returns the lower Cholesky factor of ``H + λI``, with λ the least ``damping * 10^k * mean(diag H)`` that has one.

    A column without any signal (``H_jj = 0``) has no say in the others: its row and column are those of the identity.

    Args:
        hessian: (d, d), symmetric, positive semi-definite up to rounding; float64 is best. It is damped in place and
            restored: of a wide layer nothing else takes as much memory, so that no copy is made.
        damping: as a fraction of the mean of the diagonal.

    Raises:
        ValueError: ``hessian`` is not finite or far from positive semi-definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the second moments of the inputs are not finite")
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
    mean = float(diagonal.clamp(min=0).mean()) or 1.0
    rows, columns = hessian[dead], hessian[:, dead]
    try:
        hessian[dead] = 0
        hessian[:, dead] = 0
        for attempt in range(ATTEMPTS):
            hessian.diagonal().copy_(torch.where(dead, mean, diagonal + damping * 10**attempt * mean))
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if not int(failed):
                return factor
    finally:
        hessian.diagonal().copy_(diagonal)
        hessian[dead] = rows
        hessian[:, dead] = columns
    raise ValueError("the second moments of the inputs are not those of any data: far from positive semi-definite")


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Returns U, upper triangular, with ``UᵀU = (H + λI)⁻¹`` as in :func:`cholesky`, rows and columns in this order.

    With the order of rows and columns reversed, a lower factor is an upper one: ``H = R Rᵀ`` with R upper, so that
    ``U = R⁻¹``. The inverse itself is never formed.
    """
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = order.flip(0)
    upper = cholesky(hessian[backwards][:, backwards], damping).flip(0, 1)
    # By columns, as LAPACK has it: nothing is copied, and the result takes the place of the identity.
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device).T
    return torch.linalg.solve_triangular(upper, identity, upper=True, out=identity)
