import pytest
import torch

from opt8bit.ptq.statistics import Moments, Statistics
from opt8bit.ptq.target import asymmetric_target


def moments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 6, generator=generator, dtype=torch.float64)
    x_hat = x + 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    statistics = Statistics(6)
    statistics.update(x, x_hat)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return weight, x.flatten(0, 1), x_hat.flatten(0, 1), Moments(statistics, centred=False)


def test_at_full_strength_it_is_the_best_linear_guess() -> None:
    weight, x, x_hat, found = moments()
    target = asymmetric_target(weight, found, 1.0, damping=1e-12)
    best = torch.linalg.lstsq(x_hat, x @ weight.T).solution.T
    torch.testing.assert_close(target, best, rtol=1e-8, atol=1e-8)


def test_strength_goes_from_the_weight_to_the_guess() -> None:
    weight, _, _, found = moments()
    assert asymmetric_target(weight, found, 0.0) is weight
    half, full = (asymmetric_target(weight, found, strength) for strength in (0.5, 1.0))
    torch.testing.assert_close(half, (weight + full) / 2)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_where_the_streams_agree_it_is_the_weight(strength: float) -> None:
    weight, x, _, _ = moments()
    statistics = Statistics(6)
    statistics.update(x[None], x[None])
    target = asymmetric_target(weight, Moments(statistics, centred=False), strength)
    torch.testing.assert_close(target, weight, rtol=1e-12, atol=1e-12)
