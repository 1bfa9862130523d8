"""Statistics in which a token counts as much as the loss depends on it."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_calls import Inner
from test_calls import Model as WithoutHead
from test_experts import IDS, Sparse
from test_states import Caching
from test_work import Ended, ending_after
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toys import MODELS, assert_same_changes, quantized, token_ids

from opt8bit import ptq
from opt8bit.ptq import block as blockwise
from opt8bit.ptq import loss_gradients, token_weights
from opt8bit.ptq.calibration.loss_weighting import LossWeighting, TokenWeights
from opt8bit.ptq.model.blocks import block_layers, matrix
from opt8bit.ptq.model.passes import ModelError
from opt8bit.ptq.tasks import causal_lm

OPTIONS: dict[str, Any] = {"bits": 3, "group_size": 16, "batch_size": 4}


def padded(samples: int = 10, length: int = 24) -> list[dict[str, Tensor]]:
    """Batches whose sequences end, or begin, with padding."""
    ids, mask = token_ids(samples, length), torch.ones(samples, length, dtype=torch.long)
    mask[1, -7:] = mask[6, -2:] = 0
    return [{"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4]} for i in range(0, samples, 4)]


def exact_squares(model: Any, batches: list[dict[str, Tensor]]) -> dict[nn.Module, list[Tensor]]:
    """Of each layer and batch, by one backward pass through the whole model, summed over the layer's outputs."""
    found: dict[nn.Module, list[Tensor]] = {}
    for batch in batches:
        outputs: dict[nn.Module, Tensor] = {}

        def keep(layer: nn.Module, args: Any, output: Tensor, outputs: Any = outputs) -> Tensor:
            outputs[layer] = output
            return output.clone()  # what is changed in place is not the output

        layers = block_layers(model).values()
        handles = [layer.register_forward_hook(keep) for layer in layers]
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        targets = ids[:, 1:].where(mask[:, 1:] & mask[:, :-1], -100)
        logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
        for handle in handles:
            handle.remove()
        for layer, gradient in zip(layers, gradients, strict=True):
            found.setdefault(layer, []).append(gradient.square().sum(-1).reshape(ids.shape))
    return found


def expected_weights(squares: list[list[Tensor]], masks: list[Tensor], power: float, cap: float) -> list[Tensor]:
    """Of a stage's layers, from the squares of each."""
    sums = [torch.stack(of_batch).sum(0) for of_batch in zip(*squares, strict=True)]
    sizes = [each.numel() for each in sums]
    s, counts = torch.cat([each.flatten() for each in sums]), torch.cat([each.flatten() for each in masks]).bool()
    raised = (s / s[counts].mean()) ** power
    capped = torch.minimum(raised, cap * raised[counts].mean())
    weights = torch.where(counts, capped / capped[counts].mean(), 0)
    return [part.reshape(each.shape) for part, each in zip(weights.split(sizes), sums, strict=True)]


Seen = list[tuple[tuple[nn.Module, ...], list[Any]]]  # layers of a stage, and inputs by batch


def watch_stages(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen: Seen = []
    compress_stage = blockwise.compress_stage

    def watched(layers: Any, inputs: Any, *others: Any) -> Any:
        seen.append((tuple(layers.values()), list(inputs)))
        return compress_stage(layers, inputs, *others)

    monkeypatch.setattr(blockwise, "compress_stage", watched)
    return seen


@pytest.mark.sampled(5)
@pytest.mark.parametrize("weighting", [LossWeighting(), LossWeighting(power=1.0, cap=1.5)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_a_backward_pass_through_the_whole_model(
    name: str, weighting: LossWeighting, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = MODELS[name]().double(), padded()
    masks = [batch["attention_mask"] for batch in batches]
    monkeypatch.setattr(causal_lm, "PREDICTED", 5)
    seen = watch_stages(monkeypatch)
    ptq.compress(model, batches, bits=3, group_size=16, loss_weighting=weighting)
    squares = exact_squares(model, batches)
    assert {layer for layers, _ in seen for layer in layers} == set(block_layers(model).values())
    for layers, inputs in seen:
        expected = expected_weights([squares[layer] for layer in layers], masks, weighting.power, weighting.cap)
        for each, weights, mask in zip(inputs, expected, masks, strict=True):
            torch.testing.assert_close(each.weights, weights, rtol=1e-8, atol=1e-12)
            assert not each.weights[mask == 0].any()
        everything = torch.cat([each.weights[mask == 1] for each, mask in zip(inputs, masks, strict=True)])
        assert float(everything.mean()) == pytest.approx(1) and float(everything.std()) > 0.1


@pytest.mark.sampled(4)
@pytest.mark.parametrize("correct", ["none", "sequential", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_that_are_all_alike_change_no_bit(correct: str, dtype: torch.dtype) -> None:
    model = MODELS["llama"]().to(dtype)
    for calibration in (token_ids(), padded()):
        plain, alike = (
            ptq.compress(model, calibration, **OPTIONS, bias_correction=correct, loss_weighting=weighting)
            for weighting in ("none", LossWeighting(power=0))
        )
        assert_same_changes(alike, plain)


def test_tokens_weigh_alike_where_nothing_depends_on_any() -> None:
    found = LossWeighting().weights([torch.zeros(2, 3)], [torch.tensor([[1, 1, 0], [1, 1, 1]])])
    assert torch.equal(found[0], torch.tensor([[1, 1, 0], [1, 1, 1.0]], dtype=torch.float64))


def weighted_error(model: nn.Module, result: ptq.Result, seen: Seen) -> Iterator[tuple[str, float]]:
    """Of each layer that reads what no rounding has changed yet, by the weights of the run that was watched."""
    names = {layer: name for name, layer in block_layers(model).items()}
    layers, inputs = seen[0]
    for layer in layers:
        difference = matrix(layer) - quantized(result, names[layer]).dequantize()
        errors = [(each.x @ difference.T).square().sum(-1) * each.weights for each in inputs]
        yield names[layer], float(sum(error.sum() for error in errors))


def test_errors_of_tokens_that_matter_become_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = MODELS["llama"]().double(), token_ids(40)
    weighting = LossWeighting(power=1.0)
    plain = ptq.compress(model, ids, bits=3, group_size=16)
    seen = watch_stages(monkeypatch)
    weighted = ptq.compress(model, ids, bits=3, group_size=16, loss_weighting=weighting)
    before, after = (dict(weighted_error(model, result, seen)) for result in (plain, weighted))
    assert len(before) == 3 and all(after[name] < before[name] for name in before)


def test_blocks_that_are_read_from_files_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = MODELS["llama"]()
    model.save_pretrained(tmp_path / "model")
    groups: list[int] = []
    there_and_back = loss_gradients._there_and_back

    def watched(source: Any, names: Any, passes: Any) -> Any:
        groups.append(len(passes))
        return there_and_back(source, names, passes)

    monkeypatch.setattr(loss_gradients, "_there_and_back", watched)
    monkeypatch.setattr(loss_gradients, "HELD", 2)
    options = {**OPTIONS, "batch_size": 2, "loss_weighting": "tokens"}
    results = [ptq.compress(source, token_ids(), **options) for source in (model, ptq.Checkpoint(tmp_path / "model"))]
    assert groups == [1] * 5 + [5]
    assert_same_changes(*results)


def test_the_model_is_left_as_it_was() -> None:
    model = MODELS["llama"]()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    ptq.compress(model, token_ids(), **OPTIONS, loss_weighting="tokens")
    for param in model.parameters():
        assert param.grad is None and param.requires_grad == (param is not frozen)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def test_an_ended_run_keeps_the_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "loss_weighting": "tokens"}
    expected = ptq.compress(MODELS["llama"](), token_ids(), **options)
    with pytest.raises(Ended):
        ptq.compress(MODELS["llama"](), token_ids(), **options, work=tmp_path, see=ending_after(8))
    assert (tmp_path / "gradients-0.safetensors").is_file()
    monkeypatch.setattr(token_weights, "squared_gradients", None)
    assert_same_changes(ptq.compress(MODELS["llama"](), token_ids(), **options, work=tmp_path), expected)
    other = {**options, "loss_weighting": LossWeighting(power=1.0)}
    with pytest.raises(ValueError, match="differs in: options"):
        ptq.compress(MODELS["llama"](), token_ids(), **other, work=tmp_path)


def test_bfloat16_gives_nearly_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for has_amx in (False, True):
        monkeypatch.setattr(loss_gradients, "has_amx", lambda has_amx=has_amx: has_amx)
        with pytest.MonkeyPatch.context() as patch:
            seen = watch_stages(patch)
            ptq.compress(MODELS["llama"](), token_ids(40), **OPTIONS, loss_weighting="tokens")
        found.append(torch.cat([each.weights.flatten() for _, inputs in seen for each in inputs]))
    exact, narrow = found
    assert not torch.equal(exact, narrow)
    assert float((exact - narrow).abs().mean()) < 0.02


class Model(WithoutHead):
    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(input_ids).logits @ self.embedding.weight.T)


def test_experts_that_see_only_some_tokens_are_not_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Model(Sparse(), Sparse())
    seen = watch_stages(monkeypatch)
    with pytest.warns(UserWarning) as caught:
        ptq.compress(model, IDS, bits=3, group_size=8, batch_size=4, loss_weighting="tokens")
    [message] = [str(each.message) for each in caught if "not weighted by the loss" in str(each.message)]
    assert message.startswith("tokens are not weighted by the loss: they do not all go through blocks.0.experts.0.gate")
    assert {layer for layers, _ in seen for layer in layers} == {
        layer for block in model.blocks for layer in (block.before, block.after)
    }
    assert all(each.weights is not None for _, inputs in seen for each in inputs)


def test_blocks_that_hand_on_more_are_not_weighted() -> None:
    model = Caching(True)
    plain = ptq.compress(model, token_ids(), bits=3, group_size=8)
    message = "tokens are not weighted by the loss: blocks hand more to later ones than hidden states"
    with pytest.warns(UserWarning, match=message):
        found = ptq.compress(model, token_ids(), bits=3, group_size=8, loss_weighting="tokens")
    assert_same_changes(found, plain)


class NoLogits(Model):
    def forward(self, input_ids: Tensor) -> Any:
        super().forward(input_ids)
        return (None,)


def test_models_without_a_loss_are_not_weighted() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not weighted by the loss: the model puts out no logits"):
        ptq.compress(NoLogits(Inner(), Inner()), token_ids(), bits=3, group_size=8, loss_weighting="tokens")


class Constant(Inner):
    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(hidden)


def test_a_model_that_cannot_be_differentiated_is_named() -> None:
    with pytest.raises(ModelError, match=r"the backward pass of the model's block blocks\.1 raised RuntimeError"):
        ptq.compress(Model(Inner(), Constant()), token_ids(), bits=3, group_size=8, loss_weighting="tokens")


def test_gradients_that_are_not_finite_are_refused_by_layer() -> None:
    squares = {"first": [torch.tensor([[1.0, torch.inf]])], "second": [torch.ones(1, 2)]}
    with pytest.raises(ValueError, match="first: the gradient of the loss is not finite"):
        TokenWeights(LossWeighting(), squares, [None]).of(["first", "second"])
    masked = TokenWeights(LossWeighting(), squares, [torch.tensor([[1, 0]])]).of(["first", "second"])
    assert masked is not None and masked[0].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -0.5}, "power must be a number of at least 0, got -0.5"),
        ({"power": True}, "power must be a number of at least 0, got True"),
        ({"cap": 0.5}, "cap must be a number of at least 1, got 0.5"),
        ({"cap": float("nan")}, "cap must be a number of at least 1, got nan"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LossWeighting(**options)


def test_methods_that_look_at_no_inputs_refuse_weights() -> None:
    with pytest.raises(ValueError, match=re.escape("RTN() looks at no inputs: loss_weighting must be 'none'")):
        ptq.compress(MODELS["llama"](), token_ids(), method="rtn", group_size=16, loss_weighting="tokens")
