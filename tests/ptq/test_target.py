import pytest
import torch

from opt8bit.ptq.correction.target import asymmetric_target


def problem() -> tuple[torch.Tensor, ...]:
    """A weight, and rows of x, x̂ and the drift δ of what the layer's output is added to."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x_hat = x + 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    drift = torch.randn(200, 3, generator=generator, dtype=torch.float64) + x_hat[:, :3]
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return weight, x, x_hat, drift


@pytest.mark.parametrize("drifted", [False, True])
def test_at_full_strength_it_is_the_best_linear_guess(drifted: bool) -> None:
    weight, x, x_hat, drift = problem()
    y = x @ weight.T + (drift if drifted else 0)
    missing, hessian = (y - x_hat @ weight.T).T @ x_hat / 200, x_hat.T @ x_hat / 200
    target = asymmetric_target(weight, missing, hessian, 1.0, damping=1e-12)
    best = torch.linalg.lstsq(x_hat, y).solution.T
    torch.testing.assert_close(target, best, rtol=1e-8, atol=1e-8)
    assert torch.equal(hessian, x_hat.T @ x_hat / 200)  # it is what the target is rounded on


def test_strength_goes_from_the_weight_to_the_guess() -> None:
    weight, x, x_hat, _ = problem()
    given = weight @ (x - x_hat).T @ x_hat, x_hat.T @ x_hat
    none, half, full = (asymmetric_target(weight, *given, strength) for strength in (0.0, 0.5, 1.0))
    assert torch.equal(none, weight)
    torch.testing.assert_close(half, (weight + full) / 2)
