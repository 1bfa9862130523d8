"""Local Bias Compensation: a block's last layer makes up for the mean error of the whole block."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from toys import MODELS, WRITERS, token_ids

from opt8bit import ptq
from opt8bit.ptq.correction.bias import block_shift
from opt8bit.ptq.model.anatomy import anatomy
from opt8bit.ptq.model.blocks import evaluating, find_blocks
from opt8bit.ptq.model.recording import block_calls
from opt8bit.ptq.model.rehearsal import rehearse
from opt8bit.ptq.model.source import InMemory

WIDTH = 16
unshrunk = pytest.mark.usefixtures("_unshrunk")


@pytest.fixture
def _unshrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt8bit.ptq.correction.bias.shrunk", lambda shift, standard_error: shift)


def centre(error: Tensor, mask: Tensor, statistic: str) -> Tensor:
    if statistic == "position":
        return (error * mask[..., None]).sum(0) / mask.sum(0)[:, None]
    counted = error[mask.bool()]
    return counted.mean(0) if statistic == "mean" else counted.median(0).values


@pytest.mark.sampled(5)
@unshrunk
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("statistic", ["mean", "median", pytest.param("position", marks=pytest.mark.slow)])
def test_a_local_bias_centres_the_error_of_a_whole_block(name: str, statistic: str) -> None:
    """For the float model's hidden states, where padding does not count; of no other block is the error centred."""
    model, ids = MODELS[name]().double(), token_ids()
    mask = torch.ones_like(ids)
    mask[3:, 20:] = 0
    batches = [{"input_ids": ids[i : i + 5], "attention_mask": mask[i : i + 5]} for i in (0, 5)]
    result = ptq.compress(model, batches, bits=2, group_size=16, bias_correction="local", statistic=statistic)
    (prefix, blocks), (_, rounded) = find_blocks(model), find_blocks(result.compressed_model())
    whole, corrected = {"input_ids": ids, "attention_mask": mask}, 0
    with evaluating(model):
        calls = rehearse(InMemory(model), prefix, blocks, whole).calls(model, blocks, whole)
        hidden = calls[0].hidden
        for i, (block, block_hat, call) in enumerate(zip(blocks, rounded, calls, strict=True)):
            call = call._replace(hidden=hidden)
            hidden = call.of(block)
            error = hidden - call.of(block_hat.eval())
            (last,) = anatomy(block, call).stages[-1]
            writes = last.rpartition(".")[2] in WRITERS[name]
            held = writes and result.places[f"{prefix}.{i}.{last}"] is not None
            assert float(error.abs().max()) > 1e-3 and (centre(error, mask, statistic).abs().max() < 1e-6) == held
            corrected += held
    assert corrected == (0 if name in ("gemma2", "qwen3", "mistral") else 2)


class Block(nn.Module):
    """A branch of attention's kind, added to the hidden states, and one behind which there may be a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.first, self.norm = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), norm
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.first(self.before(hidden))
        return hidden + self.norm(self.down(self.up(hidden).relu()))


class Model(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, WIDTH)
        self.blocks = nn.ModuleList([Block(norm or nn.Identity())])

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.blocks[0](self.embedding(input_ids)))


def compress(model: nn.Module, **options: object) -> ptq.Result:
    options = {"bits": 2, "group_size": 8, "bias_correction": "local", **options}
    return ptq.compress(model, token_ids(40), **options)  # type: ignore[arg-type]


def mean_error(model: Model, result: ptq.Result, until: str | None = None) -> float:
    """Of the block's output, or of one of its layers', for the float model's inputs."""
    compressed = result.compressed_model()
    with torch.no_grad():
        if until is None:
            return float((model(token_ids(40)).logits - compressed(token_ids(40)).logits).mean((0, 1)).abs().max())
        x = model.blocks[0].before(model.embedding(token_ids(40)))  # type: ignore[operator]
        y, y_hat = (network.get_submodule(until)(x) for network in (model, compressed))
        return float((y - y_hat).mean((0, 1)).abs().max())


@unshrunk
def test_a_layer_that_is_not_the_last_answers_for_itself() -> None:
    """Where a norm stands behind the last one, or that is left as it is."""
    plain, behind_norm = Model(), Model(nn.RMSNorm(WIDTH))
    whole = compress(plain)
    assert mean_error(plain, whole) < 1e-5 and mean_error(plain, whole, "blocks.0.first") < 1e-5
    for model, overrides in ((behind_norm, None), (plain, {"*.down": None})):
        result = compress(model, overrides=overrides)
        assert mean_error(model, result) > 1e-3 and mean_error(model, result, "blocks.0.first") < 1e-5


@unshrunk
def test_layers_with_a_recipe_of_their_own_are_rounded_before_the_error_is_taken() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b, self.a = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.c(hidden) + self.a(hidden) * self.b(hidden)

    model = Model()
    model.blocks[0] = Gated()
    result = compress(model, overrides={"*.b": {"bits": 3}})
    assert {layer.bits_per_weight for layer in result.report} == {2 + 34 / 8, 3 + 35 / 8}
    assert mean_error(model, result) < 1e-5


def test_an_overflow_names_the_block_that_had_it() -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    class FiniteUntilCopied(nn.Identity):
        def __deepcopy__(self, memo: object) -> nn.Module:
            return Infinite()

    with pytest.raises(ValueError, match=r"^blocks\.0: an output of the compressed block is not finite"):
        compress(Model(FiniteUntilCopied()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_their_errors_centred(dtype: torch.dtype) -> None:
    model = MODELS["llama"]().to(dtype)
    batches = [{"input_ids": token_ids()}]
    errors = {}
    for correct in ("none", "local"):
        result = ptq.compress(
            model, batches, method=ptq.RTN(), bits=2, group_size=16, bias_correction=correct, error_propagation=0.0
        )
        (_, blocks), (_, rounded) = find_blocks(model), find_blocks(result.compressed_model())
        with evaluating(model):
            call = block_calls(model, blocks, batches[0])[0]
            errors[correct] = float((call.of(blocks[0]) - call.of(rounded[0])).float().mean((0, 1)).norm())
    assert errors["local"] < 0.3 * errors["none"]


def test_what_data_cannot_support_is_shrunk_away() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 5, 2, generator=generator)
    noise[..., 1] += 10
    shift = block_shift([noise[:4], noise[4:]], "mean")
    mean = noise.mean((0, 1))
    assert abs(float(shift[0])) < abs(float(mean[0])) and float(shift[1]) == pytest.approx(float(mean[1]), rel=1e-2)
    assert not block_shift([noise[:1]], "mean").any()  # one sequence says nothing
