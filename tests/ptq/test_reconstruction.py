"""Training blocks whose layers are rounded."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import MODELS, shaken, token_ids

from opt8bit import ptq
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.reconstruction.engine import Reconstruction
from opt8bit.ptq.reconstruction.loss import Example, capped_weights, mixed_inputs, relative_error
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.rounding import TrainRounding
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.reconstruction.trained_block import TrainedBlock
from opt8bit.quant.codebook import normal_float
from opt8bit.quant.codebook_grid import CodebookGrid
from opt8bit.quant.grid import Grid
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import Outliers, QuantizedWeight, WeightScheme

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GRIDS: dict[str, Grid] = {
    "uniform": UniformGrid(3),
    "bfloat16 scales": UniformGrid(4, symmetric=True, scale_dtype=torch.bfloat16),
    "codebook": CodebookGrid(normal_float(4), scale_dtype=torch.float16),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, grid: Grid) -> QuantizedWeight:
    found = ptq.RTN().round(weight, InputStatistics(), WeightScheme(grid, 16))
    outliers = Outliers(torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0.5, -0.25]))
    return QuantizedWeight(found.shape, found.parts, outliers)


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_stored_is_what_was_trained_bit_for_bit(grid: str) -> None:
    weight = random(8, 32)
    trained = TrainScales().start(weight, rounded(weight, GRIDS[grid]))
    assert torch.equal(trained.weight(0.0), rounded(weight, GRIDS[grid]).dequantize())
    with torch.no_grad():
        for param in trained.parameters():
            param.copy_(0.3 * random(*param.shape, seed=1))
    hard = trained.harden()
    assert torch.equal(hard.dequantize(), trained.weight(1.0))
    assert torch.equal(hard.parts[0].codes, rounded(weight, GRIDS[grid]).parts[0].codes)
    scale = hard.parts[0].params.scale
    assert torch.equal(scale, scale.to(GRIDS[grid].scale_dtype).to(scale.dtype)) and not scale.requires_grad


def test_gradients_of_scales_are_those_of_the_weight() -> None:
    weight = random(4, 32)
    grid = UniformGrid(4)
    start = ptq.RTN().round(weight, InputStatistics(), WeightScheme(grid, 16))
    trained = TrainScales().start(weight, start)
    trained.weight(0.0).square().sum().backward()
    (logarithms,) = trained.parameters()
    expected = 2 * start.dequantize().square().unflatten(1, (2, 16)).sum(-1)  # s d/ds of (s q)^2
    assert logarithms.grad is not None and torch.allclose(logarithms.grad, expected, rtol=1e-4)


def test_scales_stay_near_where_they_began() -> None:
    weight = random(4, 16)
    trained = TrainScales().start(weight, rounded(weight, UniformGrid(4)))
    (logarithms,) = trained.parameters()
    with torch.no_grad():
        logarithms.fill_(3.0)
    trained.confine()
    assert torch.equal(logarithms, torch.full_like(logarithms, 0.5))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def trainable(count: int = 4) -> tuple[nn.Module, dict[str, TrainedWeight], list[Example]]:
    block, half = Block(), Block()
    weights: dict[str, TrainedWeight] = {}
    for name in ("up", "down"):
        layer: Any = half.get_submodule(name)
        start = ptq.RTN().round(layer.weight.detach(), InputStatistics(), WeightScheme(UniformGrid(2), 16))
        weights[name] = TrainScales(lr=0.01).start(layer.weight.detach(), start)
        layer.weight.data.copy_(start.dequantize())
    calls = [Call(random(2, 8, 16, seed=i), (), {}) for i in range(count)]
    with torch.no_grad():
        examples = [Example(call, call.of(block)) for call in calls]
    return half.requires_grad_(False), weights, examples


def test_training_lowers_the_loss_on_what_it_does_not_learn_from() -> None:
    block, weights, examples = trainable()
    before = {name: param.clone() for name, param in block.state_dict().items()}
    training = Reconstruction(TrainScales(lr=0.01), steps=100).train(block, weights, examples)
    assert training.after < 0.9 * training.before and training.step > 0 and training.dropped == 0
    assert all(torch.equal(param, before[name]) for name, param in block.state_dict().items())
    layer: Any = block.get_submodule("down")
    assert layer.forward.__func__ is nn.Linear.forward


def test_what_is_held_out_is_not_learned_from() -> None:
    block, weights, examples = trainable()
    seen: list[tuple[float, bool]] = []  # the first number of each batch, and whether it is learned from

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append((float(args[0][0, 0, 0]), torch.is_grad_enabled()))

    block.register_forward_pre_hook(look)
    Reconstruction(TrainScales(lr=0.01), steps=20).train(block, weights, examples)
    learned, held_out = ({first for first, learns in seen if learns == which} for which in (True, False))
    assert len(learned) == 3 and held_out == {float(examples[-1].call.hidden[0, 0, 0])} and not learned & held_out


def test_weights_are_confined_after_every_step() -> None:
    block, weights, examples = trainable()
    found = Reconstruction(TrainScales(lr=100.0), steps=3)
    calls = []
    for weight in weights.values():
        original = weight.confine
        weight.confine = lambda original=original: calls.append(original())  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.train(block, weights, examples)
    assert len(calls) == 3 * len(weights)


def test_a_block_is_never_worse_than_it_was() -> None:
    class Worse(TrainScales):
        def start(self, weight: Tensor, rounded: QuantizedWeight) -> TrainedWeight:
            trained = super().start(weight, rounded)
            trained.penalty = lambda progress: -1e3 * sum(p.sum() for p in trained.parameters())  # type: ignore[method-assign,assignment]
            return trained

    block, weights, examples = trainable()
    for name, layer in block.named_children():
        weights[name] = Worse().start(layer.weight, weights[name].harden())  # type: ignore[arg-type]
    start = {name: weight.harden() for name, weight in weights.items()}
    training = Reconstruction(Worse(lr=0.1), steps=20).train(block, weights, examples)
    assert training.after == training.before and training.step == 0
    assert all(torch.equal(weights[name].harden().dequantize(), start[name].dequantize()) for name in weights)


def test_padding_does_not_count() -> None:
    losses = []
    for broken in (False, True):
        block, weights, examples = trainable()
        mask = torch.ones(2, 8)
        mask[:, 6:] = 0
        for i, example in enumerate(examples):
            target = example.target.clone()
            if broken:
                target[:, 6:] = 1e3
            examples[i] = example._replace(target=target, weights=mask)
        losses.append(Reconstruction(steps=5).train(block, weights, examples))
    assert losses[0] == losses[1]


def test_the_loss_is_that_of_the_formula() -> None:
    """In float64, with and without weights of tokens."""
    hidden, target, y = (random(2, 3, 4, seed=seed).double() for seed in range(3))
    call = Call(hidden, (), {})
    added = target - hidden
    expected = (y - target).square().mean() / added.var(correction=0)
    assert torch.allclose(relative_error(y, Example(call, target)), expected, rtol=1e-12)
    weights = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.25]], dtype=torch.float64)
    counted = weights > 0
    mean = added[counted].mean()
    errors = ((y - target).square().mean(-1) * weights).sum()
    changes = ((added - mean).square().mean(-1) * weights).sum()
    y[0, 2] = torch.nan  # it does not count
    assert torch.allclose(relative_error(y, Example(call, target, weights)), errors / changes, rtol=1e-12)


def test_tokens_of_huge_activations_weigh_less() -> None:
    target = torch.ones(1, 6, 4)
    target[0, 0] *= 100
    target[0, 5] *= 1e6
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    found = capped_weights(target, mask, 10.0)
    assert torch.allclose(found, torch.tensor([[0.01, 1, 1, 1, 1, 0]]))
    assert torch.allclose(capped_weights(target, None, 1e9), torch.ones(1, 6))


def test_inputs_are_a_mixture_of_both_streams() -> None:
    compressed, exact = torch.zeros(4, 8, 16), torch.ones(4, 8, 16)
    example = Example(Call(compressed, (), {}), exact, None, exact)
    generator = torch.Generator().manual_seed(0)
    shares = {share: mixed_inputs(example, share, generator).hidden.mean().item() for share in (0.0, 0.5, 1.0)}
    assert shares[0.0] == 0 and shares[1.0] == 1 and 0.4 < shares[0.5] < 0.6
    first, second = (mixed_inputs(example, 0.5, generator).hidden for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("propagation", [0.0, 0.25, 1.0])
def test_the_target_is_a_mixture_of_both_streams(propagation: float) -> None:
    block, x, exact = Block(), random(2, 8, 16), random(2, 8, 16, seed=1)
    with torch.no_grad():
        outputs = block(exact)
        expected = propagation * outputs + (1 - propagation) * block(x)
    engine = Reconstruction(propagation=propagation, float_inputs=0.5)
    (found,) = engine.examples(block, [Call(x, (), {})], [exact], [outputs], [None])
    assert torch.allclose(found.target, expected, atol=1e-6) and found.exact is exact


def with_nan_in(steps: set[int], weights: dict[str, TrainedWeight]) -> None:
    """Has the penalty of a weight be NaN in some steps."""
    count = iter(range(1000))
    weights["up"].penalty = lambda progress: torch.nan if next(count) in steps else 0.0  # type: ignore[method-assign]


def test_a_step_without_a_finite_loss_is_dropped_and_counted() -> None:
    block, weights, examples = trainable()
    with_nan_in({2, 3, 7}, weights)
    with pytest.warns(UserWarning, match="3 steps of training up, down had no finite loss and gradient$"):
        training = Reconstruction(TrainScales(lr=0.01), steps=100).train(block, weights, examples)
    assert training.dropped == 3 and training.after < 0.9 * training.before


def test_five_of_them_in_a_row_end_the_training_at_its_best() -> None:
    block, weights, examples = trainable()
    with_nan_in(set(range(45, 100)), weights)
    with pytest.warns(UserWarning, match="5 steps .*, the last 5 of them in a row, which ended it"):
        training = Reconstruction(TrainScales(lr=0.01), steps=100).train(block, weights, examples)
    assert training.dropped == 5 and 0 < training.step <= 40
    assert TrainedBlock(block, weights).loss(examples[-1:]) == training.after < training.before


def test_a_gradient_that_is_not_finite_is_dropped() -> None:
    block, weights, examples = trainable()
    start = {name: weight.harden().dequantize() for name, weight in weights.items()}
    logarithm = next(weights["up"].parameters())
    logarithm.register_hook(lambda grad: grad * torch.inf)
    with pytest.warns(UserWarning, match="5 steps"):
        training = Reconstruction(TrainScales(lr=0.01), steps=20).train(block, weights, examples)
    assert training.dropped == 5
    assert all(torch.equal(weights[name].harden().dequantize(), start[name]) for name in weights)


def test_products_of_bfloat16_lead_to_nearly_the_same_loss() -> None:
    losses = []
    for bfloat16 in (False, True):
        engine = Reconstruction(TrainScales(lr=0.01), steps=100, bfloat16=bfloat16)
        losses.append(engine.train(*trainable()))
    assert losses[0].before == losses[1].before and losses[0].after != losses[1].after
    assert abs(losses[1].after / losses[0].after - 1) < 0.02


def test_calibration_is_cut_into_batches_of_a_step() -> None:
    ids, mask = token_ids(5, 8), torch.ones(5, 8)
    parts = Reconstruction(sequences=2).batches([{"input_ids": ids, "attention_mask": mask}])
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), ids)
    assert all(part["attention_mask"].shape == part["input_ids"].shape for part in parts)
    message = "it needs 2 of up to 2 sequences, got 1"
    with pytest.raises(ValueError, match=message):
        ptq.compress(MODELS["llama"](), token_ids(2), bits=3, group_size=16, reconstruction="rounding")
    with pytest.raises(ValueError, match="there must be at least 2 examples, got 1"):
        Reconstruction().train(*trainable(1))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_nearer_to_what_it_was_with_trained_scales(name: str) -> None:
    model, ids = shaken(MODELS[name]()), token_ids(96, 16)
    results = [
        ptq.compress(model, ids, bits=2, group_size=16, batch_size=4, held_out=ids[:8], reconstruction=each)
        for each in (None, Reconstruction(TrainScales(lr=3e-3)), Reconstruction(TrainRounding(3e-3, 1e-3)))
    ]
    before, scales, rounding = (result.quality.kl_divergence for result in results if result.quality)
    assert scales < before and rounding < before
    assert all(not param.requires_grad or param.grad is None for param in model.parameters())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("what", ["scales", "rounding"])
def test_a_trained_model_is_exported_and_goes_on_after_a_kill(what: str, tmp_path: Any) -> None:
    pytest.importorskip("compressed_tensors")
    model: Any = MODELS["llama"]()
    model.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"bits": 3, "group_size": 16, "reconstruction": what, "batch_size": 2}

    def stop(report: Any, layers: int) -> None:
        if report.name.startswith("model.layers.1."):
            raise KeyboardInterrupt

    source = ptq.Checkpoint(tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        ptq.compress(source, token_ids(), work=tmp_path / "work", see=stop, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outs = []
        for work in (tmp_path / "work", None):
            result = ptq.compress(source, token_ids(), work=work, checkpoint_format="compressed-tensors", **options)
            outs.append(ptq.export(result, tmp_path / f"out-{work is None}"))
    assert ptq.verify(outs[0]).is_right
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1
    assert result.recipe.to_dict()["reconstruction"] == what


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="reconstruction must be one of scales, rounding, got 'codes'"):
        ptq.compress(MODELS["llama"](), token_ids(), group_size=16, reconstruction="codes")
    with pytest.raises(TypeError, match="reconstruction must be a name, or a Reconstruction, got 3"):
        ptq.compress(MODELS["llama"](), token_ids(), group_size=16, reconstruction=3)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        Reconstruction(steps=0)
    with pytest.raises(ValueError, match="lr must be a positive number, got -1"):
        TrainScales(lr=-1)
    for wrong, message in (
        ({"propagation": 2}, "propagation must be from 0 to 1, got 2"),
        ({"float_inputs": -1}, "float_inputs must be from 0 to 1, got -1"),
        ({"token_cap": 0}, "token_cap must be a positive number, got 0"),
        ({"schedule": "none"}, "schedule must be one of cosine, linear, got 'none'"),
        ({"bfloat16": 1}, "bfloat16 must be True or False, got 1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ):
        options: dict[str, Any] = wrong
        with pytest.raises(ValueError, match=message):
            Reconstruction(**options)
    with pytest.raises(TypeError, match="optimizer must be a class such as Adam8bit, got 'adam'"):
        Reconstruction(optimizer="adam")  # type: ignore[arg-type]
    assert issubclass(TrainScales, Parametrization)
