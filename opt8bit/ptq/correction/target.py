"""The asymmetric target: a weight that already makes up for what the layers before it changed."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.ptq.rounding.linear_algebra import cholesky

DAMPING = 0.01


def asymmetric_target(
    weight: Tensor,  # (out, in)
    missing: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in)
    strength: float,
    damping: float = DAMPING,
) -> Tensor:
    """Returns ``W* = W + α E[(y - W x̂) x̂ᵀ] (E[x̂ x̂ᵀ] + λI)⁻¹``, in the dtype of ``weight``.

    The layer will see x̂ where the float model saw x, and should put out y: ``W x``, and where its output is added to
    hidden states that have drifted by δ from the float model's, ``W x + δ``. With α = 1 and λ = 0, ``W* x̂`` is the best
    linear guess of y; with α = 0 the target is W itself.

    Args:
        missing: ``E[(y - W x̂) x̂ᵀ]``.
        hessian: ``E[x̂ x̂ᵀ]``.
        strength: α, from 0 to 1.
        damping: λ as a fraction of the mean of the diagonal.

    Raises:
        ValueError: ``hessian`` is not finite, or not that of any inputs.

    Source: the family of QEP, GPTAQ and Qronos, with the drift of the hidden states beside that of the input.
    """
    factor = cholesky(hessian, damping)
    halfway = torch.linalg.solve_triangular(factor, missing.T, upper=False)
    change = torch.linalg.solve_triangular(factor.T, halfway, upper=True)
    return weight + strength * change.T.to(weight.dtype)
