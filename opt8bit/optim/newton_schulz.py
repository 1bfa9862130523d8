"""Newton-Schulz iterations towards orthogonal matrices, in as few and as fast products as a processor allows."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.backends.processor import has_amx, product_dtype

LARGE = 512  # rows from which on it pays to do with fewer or smaller products
LARGE_WITH_AMX = 4096  # and where a processor multiplies tiles, so that products take little beside copies
PANEL = 256  # rows of a symmetric product that are computed together
WIDE = 1.5  # columns for each row, from which on polynomials of the Gram matrix take fewer products
# Iterations that bfloat16 allows on one Gram matrix, of the first and of later ones: with one more, singular values of
# matrices of low rank come out up to 1.4, where those of single iterations end at 1.2.
ON_GRAM = (3, 2)

Coefficients = tuple[float, float, float]


def orthogonalized(
    x: Tensor,  # (rows, columns), or a batch of such matrices, (batch, rows, columns)
    coefficients: Coefficients,
    steps: int,
    eps: float,
) -> Tensor:
    """Iterates by Newton-Schulz, in bfloat16, towards the nearest matrix with orthonormal rows or columns.

    It does so in float32 on processors that have no arithmetic for bfloat16. Two of an iteration's three products are
    symmetric. Where one side of a large matrix is much the longer one, several iterations become one product with a
    polynomial of the Gram matrix, whose sides are as short as the other. The matrices of a batch are iterated together,
    each for itself.

    Source: Muon: An optimizer for hidden layers in neural networks (Jordan et al., 2024).
    """
    if x.dim() == 3 and len(x) == 1:  # products of batches of one are slower
        return orthogonalized(x[0], coefficients, steps, eps)[None]
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.to(product_dtype(x.device))
    x = x.mT if is_tall else x
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)).contiguous()
    rows, columns = x.shape[-2:]
    if rows >= LARGE and columns >= WIDE * rows:
        at_once, later = ON_GRAM
        while steps:
            at_once = min(at_once, steps)
            x = _iterated_on_gram(x, coefficients, at_once)
            steps, at_once = steps - at_once, later
    else:
        x = _iterated(x, coefficients, steps)
    return x.mT if is_tall else x


def _iterated(x: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """Iterates step by step and overwrites x. What the first step has allocated serves the others."""
    a, b, c = coefficients
    gram = added = spare = None
    for _ in range(steps):
        gram = symmetric_product(x, x.mT, out=gram)
        added = symmetric_product(gram, gram, gram, beta=b, alpha=c, out=added)
        x, spare = _product(added, x, x, beta=a, out=spare), x
    return x


def _iterated_on_gram(x: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """Iterates on one Gram matrix G: each step takes x to Px and G to PGP, where P = a + bG + cG²."""
    a, b, c = coefficients
    gram = symmetric_product(x, x.mT)
    added = symmetric_product(gram, gram, gram, beta=b, alpha=c)  # P - a
    product = added.clone()  # of all P
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(steps - 1):
        for _ in range(2):
            gram = symmetric_product(added, gram, gram, beta=a)
        added = symmetric_product(gram, gram, gram, beta=b, alpha=c)
        product = symmetric_product(added, product, product, beta=a)
    return product @ x


def symmetric_product(
    left: Tensor,  # (n, m) or (batch, n, m)
    right: Tensor,  # (m, n) or (batch, m, n)
    added: Tensor | None = None,  # (n, n) or (batch, n, n), symmetric
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,  # (n, n) or (batch, n, n), none of the others
) -> Tensor:
    """Returns ``beta * added + alpha * left @ right``, (n, n), which is symmetric: half is computed, half copied.

    By panels of rows, where the matrix is large enough for that to pay. (On GPUs that has not been measured.) Products
    of a batch are computed in full.
    """
    n = left.shape[-2]
    large = LARGE_WITH_AMX if left.dtype == torch.bfloat16 and has_amx() else LARGE
    if left.dim() == 3 or left.device.type != "cpu" or n < large:
        return _product(left, right, added, beta=beta, alpha=alpha, out=out)
    whole = left.new_empty(n, n) if out is None else out
    for start in range(0, n, PANEL):
        end = min(start + PANEL, n)
        mine = None if added is None else added[start:end, :end]
        part = _product(left[start:end], right[:, :end], mine, beta=beta, alpha=alpha)
        if start:
            whole[:start, start:end] = part.T.contiguous()[:start]  # transposed whole, as torch does it fast
        whole[start:end, :end] = part
    return whole


def _product(
    left: Tensor,
    right: Tensor,
    added: Tensor | None,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Returns ``beta * added + alpha * left @ right``, or ``left @ right``, of matrices or batches of them."""
    if added is None:
        return torch.matmul(left, right, out=out)
    add_product = torch.addmm if left.dim() == 2 else torch.baddbmm
    return add_product(added, left, right, beta=beta, alpha=alpha, out=out)
