import pytest
import torch

from opt8bit.ptq.rounding.linear_algebra import cholesky, inverse_factor


def second_moments(dead: int | None = None) -> torch.Tensor:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if dead is not None:
        x[:, dead] = 0
    return x.T @ x / 40


def test_the_factor_is_that_of_the_damped_matrix() -> None:
    hessian = second_moments(dead=2)
    factor = cholesky(hessian, 0.01)
    mean = hessian.diagonal().mean()
    damped = hessian + 0.01 * mean * torch.eye(6)
    damped[2, 2] = mean  # a column without any signal
    torch.testing.assert_close(factor @ factor.T, damped)


@pytest.mark.parametrize("order", [None, [3, 0, 5, 1, 4, 2]])
def test_the_factor_of_the_inverse(order: list[int] | None) -> None:
    hessian = second_moments()
    factor = inverse_factor(hessian, 0.01, None if order is None else torch.tensor(order))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6)
    if order is not None:
        damped = damped[order][:, order]
    torch.testing.assert_close(factor.T @ factor, damped.inverse())
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("spoiled", [False, True])
def test_the_matrix_is_as_it_was(spoiled: bool) -> None:
    hessian = second_moments(dead=2)
    hessian[2, 3] = hessian[3, 2] = 1e-300  # what rounding can leave
    if spoiled:  # no damping makes this one positive
        hessian[0, 1] = hessian[1, 0] = 1e200
    before = hessian.clone()
    if spoiled:
        with pytest.raises(ValueError, match="far from positive semi-definite"):
            cholesky(hessian, 0.01)
    else:
        cholesky(hessian, 0.01)
    assert torch.equal(hessian, before)
