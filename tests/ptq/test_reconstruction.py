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
from opt8bit.ptq.reconstruction.engine import Example, Reconstruction
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.scales import TrainScales
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
    first, best = Reconstruction(TrainScales(lr=0.01), steps=100).train(block, weights, examples)
    assert best < 0.9 * first
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
    first, best = Reconstruction(Worse(lr=0.1), steps=20).train(block, weights, examples)
    assert best == first
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
            examples[i] = example._replace(target=target, mask=mask)
        losses.append(Reconstruction(steps=5).train(block, weights, examples))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_nearer_to_what_it_was_with_trained_scales(name: str) -> None:
    model, ids = shaken(MODELS[name]()), token_ids(48, 16)
    results = [
        ptq.compress(model, ids, bits=2, group_size=16, batch_size=4, held_out=ids[:8], reconstruction=each)
        for each in (None, Reconstruction(TrainScales(lr=5e-3), steps=60))
    ]
    before, after = (result.quality.kl_divergence for result in results if result.quality)
    assert after < before
    assert all(not param.requires_grad or param.grad is None for param in model.parameters())


def test_a_trained_model_is_exported_and_goes_on_after_a_kill(tmp_path: Any) -> None:
    pytest.importorskip("compressed_tensors")
    model: Any = MODELS["llama"]()
    model.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"bits": 3, "group_size": 16, "reconstruction": "scales", "batch_size": 2}

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
    assert result.recipe.to_dict()["reconstruction"] == "scales"


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="reconstruction must be one of scales, got 'codes'"):
        ptq.compress(MODELS["llama"](), token_ids(), group_size=16, reconstruction="codes")
    with pytest.raises(TypeError, match="reconstruction must be a name, or a Reconstruction, got 3"):
        ptq.compress(MODELS["llama"](), token_ids(), group_size=16, reconstruction=3)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        Reconstruction(steps=0)
    with pytest.raises(ValueError, match="lr must be a positive number, got -1"):
        TrainScales(lr=-1)
    assert issubclass(TrainScales, Parametrization)
