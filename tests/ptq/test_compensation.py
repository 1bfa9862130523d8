"""A bias that stands behind any layer: what it removes of the error, and what it refuses."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit import BiasCompensation
from opt8bit.ptq.correction.bias import _mean, _medians, shrunk
from opt8bit.ptq.correction.running import RunningMean, RunningMedian

CHANNELS = 5
SHAPES: dict[str, tuple[tuple[int, ...], int | tuple[int, ...], int | tuple[int, ...]]] = {
    "rows": ((40, CHANNELS), CHANNELS, -1),
    "tokens": ((8, 6, CHANNELS), CHANNELS, 2),
    "images": ((8, CHANNELS, 4, 3), CHANNELS, 1),
    "by position": ((8, 6, CHANNELS), (6, CHANNELS), (1, 2)),
    "images by position": ((8, CHANNELS, 4, 3), (CHANNELS, 4, 3), range(1, 4)),  # type: ignore[dict-item]
    "a single image": ((CHANNELS, 4, 3), CHANNELS, 0),
}


def outputs(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(shape, generator=generator, dtype=torch.float64)
    return y, y + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2


def exact(size: Any, axis: Any, **options: Any) -> BiasCompensation:
    return BiasCompensation(size, axis, shrink=False, dtype=torch.float64, **options)


def averaged(error: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    kept = [each % error.dim() for each in ([axis] if isinstance(axis, int) else axis)]
    others = [dim for dim in range(error.dim()) if dim not in kept]
    return error.mean(others) if others else error


@pytest.mark.parametrize("name", SHAPES)
def test_the_mean_error_is_zero_and_the_squared_error_falls_by_its_square(name: str) -> None:
    shape, size, axis = SHAPES[name]
    y, y_hat = outputs(*shape)
    compensation = exact(size, axis)
    compensation.update(y, y_hat)
    corrected = compensation(y_hat)
    assert averaged(y - corrected, axis).abs().max() < 1e-12
    assert averaged(y - y_hat, axis).abs().max() > 1e-2
    fallen = averaged((y - y_hat).square() - (y - corrected).square(), axis)
    torch.testing.assert_close(fallen, averaged(y - y_hat, axis).square())
    torch.testing.assert_close(compensation.bias.detach(), averaged(y - y_hat, axis))


@pytest.mark.parametrize("name", SHAPES)
def test_the_median_leaves_the_least_absolute_error(name: str) -> None:
    shape, size, axis = SHAPES[name]
    y, y_hat = outputs(*shape)
    compensation = exact(size, axis, statistic="median")
    compensation.update(y, y_hat)

    def absolute(bias: Tensor) -> Tensor:
        tried = copy.deepcopy(compensation)
        tried.bias.copy_(bias)
        return averaged((y - tried(y_hat)).abs(), axis)

    least = absolute(compensation.bias)
    for value in (y - y_hat).flatten():  # the best constant is among the errors
        assert (least <= absolute(torch.full_like(compensation.bias, float(value))) + 1e-12).all()
    assert compensation.rank_error == 0


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_batches_of_any_size_say_the_same(statistic: str) -> None:
    y, y_hat = outputs(12, 6, CHANNELS)
    mask = torch.rand(12, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    found = []
    for size in (12, 5, 1):
        compensation = BiasCompensation(CHANNELS, -1, statistic=statistic, dtype=torch.float64)
        for parts in zip(y.split(size), y_hat.split(size), mask.split(size), strict=True):
            compensation.update(*parts)
        found.append((compensation.bias.detach(), compensation.standard_error))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)
    error = (y - y_hat).masked_fill(~mask[..., None], torch.nan)
    if statistic == "mean":  # as a compress run has it
        expected = _mean(error.nansum(1), mask.sum(1))
    else:
        expected = _medians(lambda part: [error[..., part]], CHANNELS, CHANNELS)
    torch.testing.assert_close(found[0], (shrunk(*expected), expected[1]))


def test_what_does_not_count_may_be_anything() -> None:
    y, y_hat = outputs(8, 6, CHANNELS)
    images, images_hat = outputs(8, CHANNELS, 4, 3)
    mask = torch.ones(8, 6)
    mask[2:, 4:] = 0
    spoiled = y_hat.masked_fill(mask[..., None] == 0, torch.inf)
    for statistic in ("mean", "median"):
        compensation = exact(CHANNELS, -1, statistic=statistic)
        compensation.update(y, spoiled, mask)
        errors = (y - y_hat)[mask.bool()]
        expected = errors.mean(0) if statistic == "mean" else errors.median(0).values
        torch.testing.assert_close(compensation.bias.detach(), expected)
    left = torch.zeros(8, 1, 4, 3)
    left[..., :2] = 1
    compensation = exact(CHANNELS, 1)
    compensation.update(images, images_hat, left)
    torch.testing.assert_close(compensation.bias.detach(), (images - images_hat)[..., :2].mean((0, 2, 3)))
    by_position = exact((6, CHANNELS), (1, 2))
    by_position.update(y, spoiled, mask)
    torch.testing.assert_close(by_position.bias[5].detach(), (y - y_hat)[:2, 5].mean(0))


def test_before_an_update_it_is_the_identity() -> None:
    for shape, size, axis in SHAPES.values():
        assert torch.equal(BiasCompensation(size, axis)(outputs(*shape)[0]), outputs(*shape)[0])
    y, _ = outputs(8, CHANNELS, 6)
    compensation = BiasCompensation(CHANNELS, -1)
    assert compensation(y.half().movedim(1, -1)).dtype == torch.float16
    assert compensation.standard_error is None


def test_what_few_samples_say_is_shrunk() -> None:
    y, y_hat = outputs(1, 6, CHANNELS)
    compensation = BiasCompensation(CHANNELS, -1)
    compensation.update(y, y_hat)
    assert not compensation.bias.any()  # a single sample supports nothing
    for seed in range(1, 200):
        compensation.update(*outputs(1, 6, CHANNELS, seed=seed))
    torch.testing.assert_close(compensation.bias.detach(), torch.full((CHANNELS,), -0.2), rtol=0.1, atol=0)


def test_a_median_that_outgrows_its_memory_tells_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(400, 50, 2, generator=generator).exp()  # skewed
    held = 2048 * 2 * 4  # 2048 errors of both channels
    median = RunningMedian((2,), torch.device("cpu"), max_bytes=held)
    for part in error.split(16):
        median.add(part)
        assert median._bytes() <= held
    assert 0 < median.rank_error < 0.02
    assert sum(2**i * len(part) for i, level in enumerate(median.levels) for part in level) == 20000  # none is lost
    rank = (error.flatten(0, 1) <= median.shift()[0]).double().mean(0)
    assert ((rank - 0.5).abs() <= median.rank_error + 1 / 20000).all()
    masked = RunningMedian((2,), torch.device("cpu"), max_bytes=held)
    holes = torch.rand(error.shape, generator=generator) < torch.tensor([0.5, 0.0])
    error[holes] = torch.nan
    for part in error.split(16):
        masked.add(part)
    for channel in (0, 1):
        values = error[..., channel][~error[..., channel].isnan()]
        rank = float((values <= masked.shift()[0][channel]).double().mean())
        assert abs(rank - 0.5) <= masked.rank_error + 1 / len(values)


def test_sums_lose_nothing_where_all_samples_say_the_same() -> None:
    running = RunningMean((1,), torch.device("cpu"))
    for tokens in (3, 5, 7):
        running.add(torch.tensor([[1e3 * tokens]]), torch.tensor([[tokens]]))
    shift, error = running.shift()
    assert float(shift) == 1e3 and float(error) <= 1e-5


LAYERS = {
    "linear": (nn.Linear(4, CHANNELS), (3, 6, 4), -1),
    "linear, of rows": (nn.Linear(4, CHANNELS, bias=False), (6, 4), 1),
    "conv1d": (nn.Conv1d(4, CHANNELS, 3, padding=1), (3, 4, 8), 1),
    "conv2d": (nn.Conv2d(4, CHANNELS, 3, padding=1, bias=False), (3, 4, 8, 6), -3),
    "conv3d": (nn.Conv3d(4, CHANNELS, 2), (3, 4, 5, 4, 3), 1),
    "transposed": (nn.ConvTranspose2d(4, CHANNELS, 2, stride=2, bias=False), (3, 4, 5, 4), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folding_is_adding(name: str) -> None:
    layer, shape, axis = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y_hat = layer(x).detach()
    compensation = exact(CHANNELS, axis)
    shift = torch.arange(CHANNELS).view(-1, *[1] * (y_hat.dim() - 1 - axis % y_hat.dim()))
    compensation.update(y_hat + shift, y_hat)
    expected = compensation(y_hat)
    assert (expected - y_hat).abs().max() == pytest.approx(CHANNELS - 1)
    compensation.fold_into(layer)
    torch.testing.assert_close(layer(x).detach(), expected)
    assert torch.equal(compensation(y_hat), y_hat)  # the bias has moved


def test_folding_refuses_what_is_not_adding() -> None:
    y, y_hat = outputs(8, 6, CHANNELS)
    linear, conv = nn.Linear(4, CHANNELS), nn.Conv1d(4, CHANNELS, 1)
    compensation = exact(CHANNELS, -1)
    compensation.update(y, y_hat)
    bias = compensation.bias.clone()
    with pytest.raises(ValueError, match="channel_axis must be -2 for Conv1d, got -1"):
        compensation.fold_into(conv)
    with pytest.raises(ValueError, match="the layer must have 5 channels, got 7"):
        compensation.fold_into(nn.Linear(4, 7))
    with pytest.raises(TypeError, match=r"layer must be nn.Linear.*LayerNorm"):
        compensation.fold_into(nn.LayerNorm(CHANNELS))
    with pytest.raises(ValueError, match="a bias over 2 dimensions has no place in a layer"):
        exact((6, CHANNELS), (1, 2)).fold_into(linear)
    with pytest.raises(ValueError, match="must count from the back to fold a bias without an update, got 2"):
        exact(CHANNELS, 2).fold_into(linear)
    assert torch.equal(compensation.bias, bias)
    compensation.fold_into(linear)


def test_a_constant_is_all_that_a_position_needs_but_for_padding() -> None:
    """At the edge a convolution's error has another mean: a bias by position removes it, one by channel does not."""
    torch.manual_seed(0)
    layer, rounded = (nn.Conv2d(3, CHANNELS, 3, padding=1).double() for _ in range(2))
    x = torch.rand(64, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        y, y_hat = layer(x), rounded(x)
    by_channel, by_position = exact(CHANNELS, 1), exact((CHANNELS, 8, 8), (1, 2, 3))
    for compensation in (by_channel, by_position):
        compensation.update(y, y_hat)
    assert (y - by_position(y_hat)).mean(0).abs().max() < 1e-12
    left = (y - by_channel(y_hat)).mean(0)
    assert left.mean((1, 2)).abs().max() < 1e-12 and left.abs().max() > 1e-2
    torch.testing.assert_close(by_position.bias.mean((1, 2)), by_channel.bias)


def test_the_state_dict_holds_the_bias() -> None:
    y, y_hat = outputs(8, 6, CHANNELS)
    compensation = exact(CHANNELS, -1)
    compensation.update(y, y_hat)
    assert list(compensation.state_dict()) == ["bias"]
    loaded = exact(CHANNELS, -1)
    loaded.load_state_dict(compensation.state_dict())
    assert torch.equal(loaded(y_hat), compensation(y_hat))
    with pytest.raises(ValueError, match=r"the bias was loaded.*call reset\(\) first"):
        loaded.update(y, y_hat)
    loaded.reset()
    assert torch.equal(loaded(y_hat), y_hat)
    loaded.update(y, y_hat)
    assert torch.equal(loaded.bias, compensation.bias)
    file = io.BytesIO()
    torch.save(compensation, file)
    file.seek(0)
    for other in (copy.deepcopy(compensation), torch.load(file, weights_only=False)):
        other.update(*outputs(8, 6, CHANNELS, seed=1))
        compensation_of_both = copy.deepcopy(compensation)
        compensation_of_both.update(*outputs(8, 6, CHANNELS, seed=1))
        assert torch.equal(other.bias, compensation_of_both.bias)


Y = torch.zeros(8, 6, CHANNELS)


def spoiled(value: float) -> Tensor:
    y = Y.clone()
    y[2, 0, 4] = value
    return y


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((Y,), Y), TypeError, "float_output must be a tensor, got tuple: pass the tensor that is in it"),
        ((Y, [Y]), TypeError, "quantized_output must be a tensor, got list"),
        ((Y.long(), Y), TypeError, "float_output must be of floating-point numbers, got torch.int64"),
        ((Y, Y[:4]), ValueError, r"must have the same shape, got \(8, 6, 5\) and \(4, 6, 5\)"),
        ((Y[..., :4], Y[..., :4]), ValueError, r"must have \(5,\) channels in dimensions \(-1,\), got \(4,\)"),
        ((spoiled(torch.nan), Y), ValueError, r"float_output must be finite, got nan at \[2, 0, 4\]"),
        ((Y, spoiled(-torch.inf)), ValueError, r"quantized_output must be finite, got -inf at \[2, 0, 4\]"),
        ((spoiled(3e38), spoiled(-3e38)), ValueError, "beyond the range of torch.float32"),
        ((Y, Y, torch.ones(8, 5)), ValueError, r"mask must have the first dimensions.*got \(8, 5\)"),
    ],
)
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bad_batches_are_refused_and_nothing_changes(
    arguments: Any, error: type[Exception], message: str, statistic: str
) -> None:
    compensation = exact(CHANNELS, -1, statistic=statistic)
    y, y_hat = outputs(8, 6, CHANNELS)
    compensation.update(y, y_hat)
    before = compensation.bias.clone()
    with pytest.raises(error, match=message):
        compensation.update(*arguments)
    compensation.settle()
    assert torch.equal(compensation.bias, before)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 1), {}, "channel_size must be an integer of at least 1 or a sequence of them, got 0"),
        ((2.5, 1), {}, "channel_size must be an integer"),
        (((), ()), {}, "channel_size must be an integer or a sequence of them, got ()"),
        ((2, "1"), {}, "channel_axis must be an integer"),
        (((2, 3), 1), {}, "channel_axis must name one dimension for each size"),
        ((2, 1), {"statistic": "mode"}, "statistic must be one of mean, median, got 'mode'"),
        ((2, 1), {"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ((2, 1), {"dtype": torch.int8}, "dtype must be a floating-point one, got torch.int8"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        BiasCompensation(*arguments, **options)


def test_dimensions_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must name dimensions of output \(8, 6, 5\) in order, got \(3,\)"):
        BiasCompensation(CHANNELS, 3)(Y)
    with pytest.raises(ValueError, match=r"in order, got \(2, 1\)"):
        BiasCompensation((CHANNELS, 6), (2, 1))(Y)
    with pytest.raises(TypeError, match="output must be a tensor, got NoneType"):
        BiasCompensation(CHANNELS, -1)(None)  # type: ignore[arg-type]


def test_it_is_offered_by_the_package() -> None:
    assert opt8bit.BiasCompensation is opt8bit.ptq.BiasCompensation
    assert repr(BiasCompensation((2, 3), (1, 2))) == "BiasCompensation((2, 3), (1, 2), statistic='mean', shrink=True)"
    assert repr(BiasCompensation(2, 1)).startswith("BiasCompensation(2, 1,")
