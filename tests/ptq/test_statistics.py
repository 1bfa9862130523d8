import pytest
import torch

from opt8bit.ptq.calibration.statistics import TRIANGLE, Moments, Statistics, add_gram


def streams(sequences: int = 6, length: int = 5, features: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sequences, length, features, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(x.shape, generator=generator, dtype=torch.float64)


def seen(*batches: tuple[torch.Tensor, ...]) -> Statistics:
    statistics = Statistics(batches[0][0].shape[-1])
    for batch in batches:
        statistics.update(*batch)
    return statistics


def assert_same(a: Statistics, b: Statistics) -> None:
    for name, value in vars(a).items():
        torch.testing.assert_close(value, getattr(b, name), rtol=1e-12, atol=1e-12)


def test_moments_are_those_of_the_tokens() -> None:
    x, x_hat = streams()
    statistics = seen((x, x_hat))
    rows, rows_hat = x.flatten(0, 1), x_hat.flatten(0, 1)
    assert int(statistics.count) == len(rows)
    torch.testing.assert_close(statistics.mean_x, rows.mean(0))
    torch.testing.assert_close(statistics.mean_x_hat, rows_hat.mean(0))
    memory = [square.data_ptr() for square in (statistics.sum_x_hat_x_hat, statistics.sum_cross)]
    moments = Moments(statistics)
    torch.testing.assert_close(moments.cross, rows.T @ rows_hat / len(rows))
    torch.testing.assert_close(moments.x_hat_x_hat, rows_hat.T @ rows_hat / len(rows))
    moments.centre()
    torch.testing.assert_close(moments.x_hat_x_hat, rows_hat.T.cov(correction=0))
    both = torch.cat([rows, rows_hat], 1).T.cov(correction=0)
    torch.testing.assert_close(moments.cross, both[:4, 4:])
    assert [square.data_ptr() for square in (moments.x_hat_x_hat, moments.cross)] == memory
    assert not statistics.sum_x_hat_x_hat.numel() and not statistics.sum_cross.numel()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_of_any_size_come_to_the_same(size: int) -> None:
    x, x_hat = streams()
    assert_same(seen((x, x_hat)), seen(*zip(x.split(size), x_hat.split(size), strict=True)))


def test_merging_is_seeing_both() -> None:
    x, x_hat = streams()
    first, second = seen((x[:2], x_hat[:2])), seen((x[2:], x_hat[2:]))
    first.merge(second)
    assert_same(first, seen((x, x_hat)))


@pytest.mark.parametrize("padding", [0.0, 1e30, float("inf"), float("nan")])
def test_what_is_masked_does_not_count(padding: float) -> None:
    x, x_hat = streams()
    mask = torch.ones(6, 5)
    mask[1, 3:] = mask[4, :2] = 0
    padded, padded_hat = x.clone(), x_hat.clone()
    padded[mask == 0] = padded_hat[mask == 0] = padding
    expected = Statistics(4)
    for i in range(6):
        kept = mask[i].bool()
        expected.update(x[i, kept][None], x_hat[i, kept][None])
    assert_same(seen((padded, padded_hat, mask)), expected)


def test_float32_sums_keep_float64_batches_apart() -> None:
    x, x_hat = streams()
    statistics = Statistics(4, dtype=torch.float32)
    statistics.update(x.float(), x_hat.float())
    assert statistics.sum_cross.dtype == torch.float32
    torch.testing.assert_close(statistics.sum_cross.double(), seen((x, x_hat)).sum_cross, rtol=1e-5, atol=1e-4)


def test_what_is_wanted_takes_the_place_of_x_in_the_cross_moment() -> None:
    x, x_hat = streams()
    wanted = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    mask = torch.ones(6, 5)
    mask[2, 3:] = 0
    statistics = Statistics(4, wanted=3)
    statistics.update(x[:4], x_hat[:4], mask[:4], wanted[:4])
    other = Statistics(4, wanted=3)
    other.update(x[4:], x_hat[4:], mask[4:], wanted[4:])
    statistics.merge(other)
    counts = mask.bool()
    rows_hat, rows = x_hat[counts], wanted[counts]
    torch.testing.assert_close(statistics.mean_x, x[counts].mean(0))
    torch.testing.assert_close(statistics.mean_wanted, rows.mean(0))
    moments = Moments(statistics)
    torch.testing.assert_close(moments.cross, rows.T @ rows_hat / len(rows))
    both = torch.cat([rows, rows_hat], 1).T.cov(correction=0)
    moments.centre()
    torch.testing.assert_close(moments.cross, both[:3, 3:])
    for bad in (None, wanted[..., :2]):
        with pytest.raises(ValueError, match=r"wanted must be \(6, 5, 3\), got"):
            statistics.update(x, x_hat, mask, bad)
    with pytest.raises(ValueError, match=r"wanted must be None, got \(6, 5, 3\)"):
        Statistics(4).update(x, x_hat, mask, wanted)


def test_sums_that_are_not_asked_for_stay_empty() -> None:
    x, x_hat = streams()
    statistics, expected = Statistics(4, hessian=False, cross=False), seen((x, x_hat))
    statistics.update(x, x_hat)
    assert not statistics.sum_x_hat_x_hat.numel() and not statistics.sum_cross.numel()
    torch.testing.assert_close(statistics.mean_x_hat, expected.mean_x_hat)
    moments = Moments(statistics)
    moments.centre()
    assert not moments.x_hat_x_hat.numel() and not moments.cross.numel()


def test_gram_of_more_columns_than_one_piece() -> None:
    rows = torch.randn(3, 2 * TRIANGLE + 7, dtype=torch.float64)
    total = torch.ones(len(rows.T), len(rows.T), dtype=torch.float64)
    add_gram(total, rows.T)
    torch.testing.assert_close(total, 1 + rows.T @ rows)


def test_what_is_not_finite_is_refused_and_changes_nothing() -> None:
    x, x_hat = streams()
    statistics, expected = seen((x, x_hat)), seen((x, x_hat))
    bad = x.clone()
    bad[0, 0, 0] = float("nan")
    for pair in ((bad, x_hat), (x, bad)):
        with pytest.raises(ValueError, match="not finite"):
            statistics.update(*pair)
    assert_same(statistics, expected)


def test_shapes_and_dtypes_are_checked() -> None:
    x, x_hat = streams()
    with pytest.raises(ValueError, match=r"must both be \(sequences, length, 4\), got \(6, 5, 4\) and \(6, 5, 3\)"):
        Statistics(4).update(x, x_hat[..., :3])
    with pytest.raises(ValueError, match=r"mask must be \(6, 5\), got \(6, 4\)"):
        Statistics(4).update(x, x_hat, torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"weights must be \(6, 5\), got \(5,\)"):
        Statistics(4).update(x, x_hat, weights=torch.ones(5))
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64, got torch.bfloat16"):
        Statistics(4, dtype=torch.bfloat16)


def test_a_token_of_weight_two_counts_as_two() -> None:
    x, x_hat = streams()
    weights = torch.tensor([0, 1, 2, 1, 2], dtype=torch.float64).repeat(6, 1)
    mask = torch.ones(6, 5)
    mask[2, 4:] = 0
    wanted = x_hat[..., :3] + 1
    repeated = Statistics(4, wanted=3)
    for i in range(6):
        each = torch.arange(5).repeat_interleave((weights[i] * mask[i]).long())
        repeated.update(x[i, each][None], x_hat[i, each][None], None, wanted[i, each][None])
    weighted = Statistics(4, wanted=3)
    weighted.update(x, x_hat, mask, wanted, weights)
    assert_same(weighted, repeated)


def test_weights_of_one_change_no_bit() -> None:
    x, x_hat = (stream.float() for stream in streams())
    mask = torch.ones(6, 5)
    mask[2, 4:] = 0
    for each in (None, mask):
        plain, ones = Statistics(4), Statistics(4)
        plain.update(x, x_hat, each)
        ones.update(x, x_hat, each, weights=torch.ones(6, 5, dtype=torch.float64))
        for name, value in vars(plain).items():
            assert torch.equal(value, getattr(ones, name)), name
