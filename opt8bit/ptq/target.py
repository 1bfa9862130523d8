"""The asymmetric target: a weight that already makes up for what the layers before it changed."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.ptq.linear_algebra import cholesky
from opt8bit.ptq.statistics import Moments

DAMPING = 0.01


def asymmetric_target(
    weight: Tensor,  # (out, in)
    moments: Moments,
    strength: float,
    damping: float = DAMPING,
) -> Tensor:
    """``W* = W + α W (E[x x̂ᵀ] - E[x̂ x̂ᵀ]) (E[x̂ x̂ᵀ] + λI)⁻¹``, in the dtype of ``weight``.

    The layer will see x̂ where the float model saw x. With α = 1 and λ = 0, ``W* x̂`` is the best linear guess of
    ``W x``; with α = 0 the target is W itself.

    Args:
        strength: α, from 0 to 1.
        damping: λ as a fraction of the mean of the diagonal.

    Source: the family of QEP, GPTAQ and Qronos.
    """
    if not strength:
        return weight
    _, factor = cholesky(moments.x_hat_x_hat, damping)
    drift = (moments.cross - moments.x_hat_x_hat).T @ weight.T.to(factor.dtype)  # (in, out)
    return weight + strength * torch.cholesky_solve(drift, factor).T.to(weight.dtype)
