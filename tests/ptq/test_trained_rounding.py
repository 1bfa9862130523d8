"""Parametrizations that train roundings: where they start, what they store, and their gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opt8bit import ptq
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.reconstruction.engine import Reconstruction, Training
from opt8bit.ptq.reconstruction.loss import Example
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight, hardened, started
from opt8bit.ptq.reconstruction.rounding import TrainRounding
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.reconstruction.sign_round import SignRound
from opt8bit.ptq.reconstruction.sign_sgd import SignSGD
from opt8bit.quant.codebook import normal_float
from opt8bit.quant.codebook_grid import CodebookGrid
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import Outliers, Part, QuantizedWeight, WeightScheme

GRIDS = {
    "asymmetric": UniformGrid(3),
    "2 bits": UniformGrid(2, range="mse"),
    "signed": UniformGrid(4, symmetric=True, scale_dtype=torch.float16),
    "restricted": UniformGrid(3, symmetric="restricted", scale_dtype=torch.bfloat16),
}
DTYPES = (torch.float32, torch.float64)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moments(features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Second moments of inputs that are far from independent, so that many codes are not the nearest."""
    x = random(4 * features, features, seed=7) @ random(features, features, seed=8)
    return (x.T @ x / len(x)).to(dtype)


def rounded(weight: Tensor, grid: UniformGrid, method: Any = None) -> QuantizedWeight:
    statistics = InputStatistics(moments(weight.shape[1], weight.dtype))
    return (method or ptq.GPTQ()).round(weight, statistics, WeightScheme(grid, 16))


def in_two_parts(weight: Tensor) -> QuantizedWeight:
    """Columns on two grids, and two weights beside them."""
    columns = torch.arange(32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))].split(16)
    parts = []
    for grid, own in zip((UniformGrid(2), UniformGrid(4)), columns, strict=True):
        (part,) = rounded(weight[:, own], grid).parts
        parts.append(replace(part, columns=own))
    outliers = Outliers(torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0.5, -0.25], dtype=weight.dtype))
    return QuantizedWeight((weight.shape[0], 32), tuple(parts), outliers)


def moved(trained: TrainedWeight, by: float) -> TrainedWeight:
    """The weight with its parameters elsewhere."""
    with torch.no_grad():
        for i, param in enumerate(trained.parameters()):
            param.add_(by * random(*param.shape, seed=i, dtype=param.dtype))
    trained.confine()
    return trained


def codes_of(weight: QuantizedWeight) -> Tensor:
    return torch.cat([part.codes for part in weight.parts], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [*GRIDS, "two parts"])
def test_rounding_starts_at_the_codes_that_a_method_chose(grid: str, dtype: torch.dtype) -> None:
    weight = random(8, 32, dtype=dtype)
    start = in_two_parts(weight) if grid == "two parts" else rounded(weight, GRIDS[grid])
    trained = started(TrainRounding(), weight, start)
    assert torch.equal(trained.weight(0.0), start.dequantize())
    assert torch.equal(codes_of(trained.harden()), codes_of(start))
    if grid != "two parts":
        nearest = Part.of(start.parts[0].grid, weight, start.parts[0].params)
        assert not torch.equal(nearest.codes, start.parts[0].codes)  # else nothing is shown by it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [*GRIDS, "two parts"])
def test_what_is_stored_of_rounding_is_what_was_trained_bit_for_bit(grid: str, dtype: torch.dtype) -> None:
    weight = random(8, 32, dtype=dtype)
    start = in_two_parts(weight) if grid == "two parts" else rounded(weight, GRIDS[grid])
    trained = moved(started(TrainRounding(), weight, start), 0.4)
    hard = hardened(trained)
    assert torch.equal(hard.dequantize(), trained.weight(1.0))
    steps = codes_of(hard).int() - codes_of(start).int()
    assert 0 < int((steps != 0).sum()) < steps.numel() and int(steps.abs().max()) == 1
    for part, before in zip(hard.parts, start.parts, strict=True):
        scale, stored = part.params.scale, part.grid.scale_dtype
        assert stored == torch.float32 or torch.equal(scale, scale.to(stored).to(dtype))
        assert not torch.equal(scale, before.params.scale)
        assert int(part.codes.max()) < 2**part.grid.bits and part.codes.dtype == torch.uint8


def test_close_calls_change_first() -> None:
    """A weight of 1.4 steps goes up by an offset that leaves one of 1.1 where it is."""
    grid, weight = UniformGrid(3), torch.tensor([[0.0, 1.1, 1.4, 7.0]], dtype=torch.float64)
    trained: Any = TrainRounding().start(weight.clone(), ptq.RTN().round(weight, InputStatistics(), WeightScheme(grid)))
    with torch.no_grad():
        trained.offsets[0].fill_(0.2)
    assert codes_of(trained.harden()).tolist() == [[0, 1, 2, 7]]
    with torch.no_grad():
        trained.offsets[0].fill_(100.0)
    trained.confine()
    assert codes_of(trained.harden()).tolist() == [[1, 2, 2, 7]]  # at most by one, and not beyond the last


def test_gradients_of_rounding_are_those_of_the_formula() -> None:
    weight, x, target = random(8, 32), random(20, 32, seed=1), random(20, 8, seed=2)
    start = rounded(weight, UniformGrid(3))
    trained: Any = moved(started(TrainRounding(), weight, start), 0.2)
    (x @ trained.weight(0.5).T - target).square().sum().backward()
    hard = trained.harden()
    slope = 2 * (x @ hard.dequantize().T - target).T @ x  # of the loss, in the weight: (8, 32)
    scale = hard.parts[0].params.scale.repeat_interleave(16, 1)
    assert torch.allclose(trained.offsets[0].grad, slope * scale, rtol=1e-10)
    expected = (slope * hard.dequantize()).unflatten(1, (2, 16)).sum(-1)
    assert torch.allclose(trained.scales.logarithms[0].grad, expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "2 bits"])
def test_sign_round_starts_at_rounding_to_nearest(grid: str, dtype: torch.dtype) -> None:
    weight = random(8, 32, dtype=dtype)
    weight[2, :16] = 0
    nearest = rounded(weight, GRIDS[grid], ptq.RTN())
    trained = started(SignRound(), weight, rounded(weight, GRIDS[grid]))
    assert torch.equal(trained.weight(0.0), nearest.dequantize())
    hard = hardened(moved(trained, 0.2))
    assert torch.equal(hard.dequantize(), trained.weight(1.0))
    assert int(codes_of(hard).max()) < 2 ** GRIDS[grid].bits


def test_gradients_of_sign_round_are_those_of_the_formula() -> None:
    """On one group of values that do not fill its range, by differences of the formula without rounding."""
    grid, weight = UniformGrid(3), random(1, 16)
    trained: Any = started(SignRound(), weight, rounded(weight, grid))
    with torch.no_grad():
        trained.alpha.fill_(0.9)
        trained.beta.fill_(0.8)
    slope = random(1, 16, seed=3)
    (trained.weight(0.0) * slope).sum().backward()
    low, high = weight.min(), weight.max()
    scale = (0.8 * high - 0.9 * low) / 7
    zero = (-0.9 * low / scale).round()
    steps = (weight / scale).round() + zero
    inside = (steps >= 0) & (steps <= 7)
    assert bool(inside.any()) and not bool(inside.all())
    assert torch.allclose(trained.offset.grad.flatten(1), slope * scale * inside, rtol=1e-10)
    # d/ds of s (clamp(w / s + z) - z), whose rounding is passed; z depends on s and alpha, too.
    to_scale = torch.where(inside, (steps - zero) - weight / scale, steps.clamp(0, 7) - zero)
    to_zero = torch.where(inside, 0.0, -scale)
    zero_by_scale, zero_by_alpha = 0.9 * low / scale**2, -low / scale
    by_scale = (slope * (to_scale + to_zero * zero_by_scale)).sum()
    by_alpha = by_scale * -low / 7 + (slope * to_zero).sum() * zero_by_alpha
    assert torch.allclose(trained.beta.grad, (by_scale * high / 7).reshape(1, 1), rtol=1e-9)
    assert torch.allclose(trained.alpha.grad, by_alpha.reshape(1, 1), rtol=1e-9)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((32, 64), (64, 32)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def inputs(seed: int) -> Tensor:
    return random(4, 16, 32, seed=seed) @ random(32, 32, seed=99) / 6


def trainable(
    parametrization: Parametrization, method: Any = None
) -> tuple[nn.Module, dict[str, TrainedWeight], list[Example]]:
    """A block whose layers are rounded in closed form, on the inputs that they have."""
    block, half = Block(), Block()
    calls = [Call(inputs(seed), (), {}) for seed in range(96)]
    weights: dict[str, TrainedWeight] = {}
    with torch.no_grad():
        x = torch.cat([call.hidden for call in calls[:84]]).flatten(0, 1)
        for name, seen in (("up", x), ("down", torch.relu(block.up(x)))):
            layer: Any = half.get_submodule(name)
            statistics = InputStatistics(seen.T @ seen / len(seen))
            scheme = WeightScheme(UniformGrid(2, range="mse"), 16)
            rounder = method or ptq.QuantEase(start=ptq.GPTQ(), sweeps=5, refits=3)
            start = rounder.round(layer.weight, statistics, scheme)
            weights[name] = started(parametrization, layer.weight, start)
            layer.weight.copy_(start.dequantize())
        examples = [Example(call, call.of(block)) for call in calls]
    return half.requires_grad_(False), weights, examples


def trained(parametrization: Parametrization, **options: Any) -> Training:
    return Reconstruction(parametrization, steps=200, **options).train(*trainable(parametrization))


def test_trained_rounding_is_ahead_of_the_closed_form_and_of_scales() -> None:
    rounding, scales = trained(TrainRounding()), trained(TrainScales(lr=3e-3))
    assert rounding.before == scales.before
    assert rounding.after < 0.9 * rounding.before and rounding.after < scales.after


def test_rounding_is_trained_by_any_optimizer() -> None:
    signed = trained(TrainRounding(1e-3, 3e-4), optimizer=SignSGD, schedule="linear")
    assert signed.after < 0.96 * signed.before
    plain = trained(TrainRounding(), optimizer=torch.optim.Adam)
    assert plain.after < 0.9 * plain.before


def test_sign_round_stays_within_half_a_step() -> None:
    block, weights, examples = trainable(SignRound(), ptq.RTN())
    engine = Reconstruction(SignRound(), steps=80, optimizer=SignSGD, schedule="linear")
    training = engine.train(block, weights, examples)
    assert training.after < 0.8 * training.before and training.step > 0
    for weight in weights.values():
        offset: Any = weight.offset
        assert 0 < float(offset.detach().abs().max()) <= 0.5
        moved(weight, 100.0)
        assert float(offset.detach().abs().max()) == 0.5


def test_a_step_of_sign_sgd_goes_by_signs() -> None:
    param = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    param.grad = torch.tensor([5.0, -0.1, 0.0])
    SignSGD([param], lr=0.25).step()
    assert param.tolist() == [0.75, 2.25, 3.0]
    assert SignSGD([param]).step(lambda: 3) == 3
    with pytest.raises(ValueError, match="lr must be a positive number, got 0"):
        SignSGD([param], lr=0)


def test_steps_too_small_to_change_a_code_leave_the_start() -> None:
    block, weights, examples = trainable(TrainRounding())
    before = {name: weight.harden() for name, weight in weights.items()}
    tiny = TrainRounding(lr=1e-12, scale_lr=1e-300)
    Reconstruction(tiny, steps=3).train(block, weights, examples)
    for name, weight in weights.items():
        assert torch.equal(weight.harden().dequantize(), before[name].dequantize())


def test_training_is_the_same_for_a_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        block, weights, examples = trainable(TrainRounding())
        Reconstruction(TrainRounding(), steps=60, seed=seed).train(block, weights, examples)
        found.append(codes_of(weights["up"].harden()))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_every_parameter_gets_its_own_rate() -> None:
    seen: list[dict[float, int]] = []

    class Watched(torch.optim.SGD):
        def __init__(self, groups: Any) -> None:
            super().__init__(groups)
            seen.append({group["lr"]: len(group["params"]) for group in self.param_groups})

    engine = Reconstruction(TrainRounding(lr=0.5, scale_lr=0.25), steps=1, optimizer=Watched)
    engine.train(*trainable(TrainRounding()))
    assert seen == [{0.5: 2, 0.25: 2}]
    Reconstruction(SignRound(), steps=8, optimizer=Watched).train(*trainable(SignRound()))
    assert seen[1:] == [{1 / 8: 6}]


def test_what_cannot_be_trained_is_refused_before_anything_is_rounded() -> None:
    from toys import MODELS, token_ids

    grid = CodebookGrid(normal_float(4))
    engine = Reconstruction(TrainRounding())
    message = r"layers\.0\..*: TrainRounding cannot train weights on <?.*CodebookGrid"
    with pytest.raises(ValueError, match=message):
        ptq.compress(MODELS["llama"](), token_ids(), group_size=16, grid=grid, reconstruction=engine)
    for wrong, message in (
        (lambda: TrainRounding(scale_lr=0), "scale_lr must be a positive number, got 0"),
        (lambda: SignRound(lr=-1), "lr must be a positive number, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    weight = random(4, 32)
    with pytest.raises(ValueError, match="SignRound trains weights on one grid, without outliers, got 2 parts"):
        SignRound().start(weight, in_two_parts(weight))
