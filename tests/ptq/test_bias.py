import pytest
import torch

from opt8bit.ptq.calibration.statistics import Inputs, InputStatistics, Moments, Statistics
from opt8bit.ptq.correction.bias import mean_shift, median_shift, position_shift, shrunk
from opt8bit.ptq.rounding import GPTQ, QuantEase, objective
from opt8bit.quant import UniformGrid
from opt8bit.quant.weight import WeightScheme

SEQUENCES, LENGTH, INPUTS, OUTPUTS = 8, 16, 12, 5


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Statistics]:
    """Weight, rounded weight, both streams and their statistics, in float64; inputs have a mean."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    x = torch.randn(SEQUENCES, LENGTH, INPUTS, generator=generator, dtype=torch.float64) + 0.7
    x_hat = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64) + 0.1
    statistics = Statistics(INPUTS)
    statistics.update(x, x_hat)
    grid = UniformGrid(3)
    return weight, grid.nearest(weight, grid.fit(weight)), x, x_hat, statistics


def mean_square(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.flatten(0, 1).square().mean(0)


@pytest.mark.parametrize("local", [True, False])
def test_the_gain_is_the_square_of_the_mean_error(local: bool) -> None:
    weight, rounded, x, x_hat, statistics = problem()
    shift, _ = mean_shift(weight, rounded, statistics, local=local)
    error = x @ weight.T - (x if local else x_hat) @ rounded.T
    torch.testing.assert_close(mean_square(error) - mean_square(error - shift), shift.square())
    torch.testing.assert_close(shift, error.flatten(0, 1).mean(0))


@pytest.mark.parametrize("local", [True, False])
def test_the_median_is_the_constant_of_least_absolute_error(local: bool) -> None:
    weight, rounded, x, x_hat, _ = problem()
    batches = [Inputs(x[:3], x_hat[:3]), Inputs(x[3:], x_hat[3:])]
    shift, noise = median_shift(weight, rounded, batches, local=local, channels=2)
    error = (x @ weight.T - (x if local else x_hat) @ rounded.T).flatten(0, 1)
    least = (error - shift).abs().mean(0)
    of_sequences = (x @ weight.T - (x if local else x_hat) @ rounded.T).median(1).values
    torch.testing.assert_close(noise, of_sequences.std(0) / SEQUENCES**0.5)
    for other in (shift + 1e-3, shift - 1e-3, error.mean(0)):
        assert (least <= (error - other).abs().mean(0) + 1e-12).all()


def test_masked_tokens_do_not_count_in_a_median_or_by_position() -> None:
    weight, rounded, x, x_hat, _ = problem()
    mask = torch.ones(SEQUENCES, LENGTH)
    mask[:, 10:] = 0
    spoiled = x.clone()
    spoiled[:, 10:] = float("nan")
    masked, cut = [Inputs(spoiled, x_hat, mask)], [Inputs(x[:, :10], x_hat[:, :10])]
    for found, expected in zip(median_shift(weight, rounded, masked), median_shift(weight, rounded, cut), strict=True):
        torch.testing.assert_close(found, expected)
    by_position = position_shift(weight, rounded, masked)
    torch.testing.assert_close(by_position[:10], position_shift(weight, rounded, cut))
    assert not by_position[10:].any()


def test_a_median_is_as_sure_as_the_medians_of_the_sequences_agree() -> None:
    """Few tokens of huge error say much about the noise of a mean, and nothing about that of a median."""
    generator = torch.Generator().manual_seed(0)
    weight, rounded = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    x = 0.2 + 0.05 * torch.randn(64, 16, 1, generator=generator, dtype=torch.float64)
    x[:, 0] = 20 * torch.randn(64, 1, generator=generator, dtype=torch.float64)
    shift, noise = median_shift(weight, rounded, [Inputs(x, x)])
    assert float(shrunk(shift, noise)) == pytest.approx(0.2, abs=0.01)
    statistics = Statistics(1)
    statistics.update(x, x)
    assert abs(float(shrunk(*mean_shift(weight, rounded, statistics))) - 0.2) > 0.05


def test_by_position_removes_the_mean_error_of_each_position() -> None:
    weight, rounded, x, x_hat, _ = problem()
    shift = position_shift(weight, rounded, [Inputs(x[:2], x_hat[:2]), Inputs(x[2:], x_hat[2:])])
    assert shift.shape == (LENGTH, OUTPUTS)
    torch.testing.assert_close(shift, (x @ weight.T - x_hat @ rounded.T).mean(0))
    with pytest.raises(ValueError, match=r"sequences of one length, got 16 and 4"):
        position_shift(weight, rounded, [Inputs(x, x_hat), Inputs(x[:, :4], x_hat[:, :4])])


def test_the_joint_objective_is_the_error_after_the_best_bias() -> None:
    weight, _, _, x_hat, statistics = problem()
    centred = Moments(statistics)
    centred.centre()
    for method in (GPTQ(), QuantEase()):
        rounded = method.round(weight, InputStatistics(centred.x_hat_x_hat), WeightScheme(UniformGrid(3))).dequantize()
        same = Statistics(INPUTS)
        same.update(x_hat, x_hat)
        shift, _ = mean_shift(weight, rounded, same)
        error = (x_hat @ (weight - rounded).T - shift).flatten(0, 1)
        torch.testing.assert_close(objective(weight, rounded, centred.x_hat_x_hat), error.square().mean(0).sum())


def test_noise_is_told_from_how_sequences_differ() -> None:
    weight, rounded, x, x_hat, statistics = problem()
    _, noise = mean_shift(weight, rounded, statistics)
    by_sequence = (x @ weight.T - x_hat @ rounded.T).mean(1)
    torch.testing.assert_close(noise, by_sequence.std(0) / SEQUENCES**0.5)


def test_one_sequence_supports_no_bias() -> None:
    weight, rounded, x, x_hat, _ = problem()
    statistics = Statistics(INPUTS)
    statistics.update(x[:1], x_hat[:1])
    assert torch.equal(shrunk(*mean_shift(weight, rounded, statistics)), torch.zeros(OUTPUTS, dtype=torch.float64))


def test_shrinking_keeps_what_is_sure_and_drops_what_is_not() -> None:
    shift = torch.tensor([1.0, -1.0, 0.5, 0.1, 0.0])
    noise = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.0])
    torch.testing.assert_close(shrunk(shift, noise), torch.tensor([1.0, -0.75, 0.0, 0.0, 0.0]))


def test_shrinking_pays_where_data_are_few() -> None:
    """Where the true mean error is 0, what is left of the estimated bias is all harm: there is less of it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, INPUTS, generator=generator, dtype=torch.float64)
    rounded = UniformGrid(2).nearest(weight, UniformGrid(2).fit(weight))
    harm, harm_shrunk = 0.0, 0.0
    for _ in range(200):
        x = torch.randn(4, 8, INPUTS, generator=generator, dtype=torch.float64)
        statistics = Statistics(INPUTS)
        statistics.update(x, x)
        shift, noise = mean_shift(weight, rounded, statistics)
        harm += float(shift.square().sum())
        harm_shrunk += float(shrunk(shift, noise).square().sum())
    assert harm_shrunk < 0.6 * harm


def test_a_drift_of_the_hidden_states_is_part_of_the_error() -> None:
    weight, rounded, x, x_hat, _ = problem()
    drift = torch.randn(SEQUENCES, LENGTH, OUTPUTS, generator=torch.Generator().manual_seed(1)).double() + 0.4
    wanted = x @ weight.T + drift
    statistics = Statistics(INPUTS, wanted=OUTPUTS)
    statistics.update(x, x_hat, None, wanted)
    inputs = [Inputs(x[:3], x_hat[:3], None, wanted[:3]), Inputs(x[3:], x_hat[3:], None, wanted[3:])]
    error = x @ weight.T - x_hat @ rounded.T + 0.5 * drift
    mean, noise = mean_shift(weight, rounded, statistics, drift_share=0.5)
    torch.testing.assert_close(mean, error.flatten(0, 1).mean(0))
    torch.testing.assert_close(noise, error.mean(1).std(0) / SEQUENCES**0.5)
    median, _ = median_shift(weight, rounded, inputs, drift_share=0.5, channels=2)
    torch.testing.assert_close(median, error.flatten(0, 1).median(0).values)
    torch.testing.assert_close(position_shift(weight, rounded, inputs, drift_share=0.5), error.mean(0))
