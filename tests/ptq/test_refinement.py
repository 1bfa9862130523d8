"""Training a compressed model as a whole."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from toys import MODELS, assert_same_changes, quantized, shaken, token_ids

from opt8bit import ptq
from opt8bit.ptq.model.blocks import evaluating, find_blocks
from opt8bit.ptq.model.rehearsal import rehearse
from opt8bit.ptq.model.source import InMemory
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.refinement import losses, need, passes, refine, training
from opt8bit.ptq.refinement.losses import kl_divergence, most_likely
from opt8bit.ptq.refinement.passes import Chain
from opt8bit.ptq.refinement.student import Student
from opt8bit.ptq.tasks.causal_lm import CausalLM
from opt8bit.quant.weight import QuantizedWeight
from opt8bit.recipe.learning import EFFORTS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text() -> Tensor:
    return token_ids(48, 32)


def compressed(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> ptq.Result:
    model = shaken(MODELS[name]()).to(dtype)
    return ptq.compress(model, text(), bits=2, group_size=16, **options)


def changed_vectors(found: ptq.Result) -> set[str]:
    return {name for name, change in found.changes.items() if isinstance(change, Tensor)}


@pytest.mark.parametrize("k", [3, 40])
def test_divergence_is_that_of_all_tokens_or_of_classes_of_them(k: int) -> None:
    teacher, own = random(5, 40), random(5, 40, seed=1)
    found = kl_divergence(own, *most_likely(teacher, k))
    exact = kl_div(log_softmax(own, -1), log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)
    if k == 40:
        assert torch.allclose(found, exact, rtol=1e-12)
    else:
        assert bool((found < exact).all() and (found > 0).all())
        top = teacher.topk(k).indices
        classes = []
        for logits in (teacher, own):
            probs = logits.softmax(-1)
            kept = probs.gather(-1, top)
            classes.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log())
        expected = kl_div(classes[1], classes[0], reduction="none", log_target=True).sum(-1)
        assert torch.allclose(found, expected, rtol=1e-10)


def test_divergence_of_what_is_certain_has_a_gradient_without_noise() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    own = logits.clone().requires_grad_()
    kl_divergence(own, *most_likely(logits, 1)).sum().backward()
    assert own.grad is not None and float(own.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_a_model_is_nearer_to_what_it_was_and_its_codes_are_what_they_were(name: str) -> None:
    start = compressed(name, bias_correction="sequential" if name == "opt" else "none")
    had = dict(start.changes)
    found = ptq.refine(start, text(), steps=20, vector_lr=2e-3, held_out=token_ids(4, 16))
    assert found.refined is not None and found.refined.kept and found.refined.best < 0.99 * found.refined.start
    assert found.quality is not None and found.probe is not None and start.quality is None
    for key, change in start.changes.items():
        assert change is had[key]
        trained = found.changes[key]
        if isinstance(change, QuantizedWeight) and isinstance(trained, QuantizedWeight):
            for own, part in zip(trained.parts, change.parts, strict=True):
                assert torch.equal(own.codes, part.codes)
                assert torch.equal(own.params.zero_point, part.params.zero_point)
                assert not torch.equal(own.params.scale, part.params.scale)
    assert len(changed_vectors(found)) > len(changed_vectors(start))
    logits = found.compressed_model()(**found.probe.inputs).logits[0, -4:]
    assert torch.allclose(logits, found.probe.logits, atol=1e-5)


def test_no_steps_return_the_start_bit_for_bit() -> None:
    start = compressed()
    found = ptq.refine(start, text(), steps=0)
    assert_same_changes(found, start)
    assert found.refined is not None and found.refined.kept == 0 and found.refined.best == found.refined.start
    assert found.probe is start.probe


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_whole_computation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks apart, logits of a few tokens and windows together against one plain graph, all in float64."""
    monkeypatch.setattr(passes, "LOGITS", 96 * 3 * 5)  # tokens do not divide the length
    monkeypatch.setattr(refine, "TEACHER", 96)
    start, ids = compressed(name, torch.float64), token_ids(3, 16)
    student = Student(start, TrainScales(), torch.float64, biases=True)
    few = {"input_ids": ids[:1]}
    with evaluating(student.model, start.model):
        known = rehearse(start.source, *find_blocks(start.model), few)
        chain, teacher = (Chain(source, known, few) for source in (InMemory(student.model), start.source))
        windows = refine._windows([{"input_ids": ids}], teacher)
        found = training._gradients(student, chain, windows, kl_divergence)

    plain = start.compressed_model().double()
    logarithms: dict[str, Tensor] = {}
    params: dict[str, Tensor] = {}
    for key in student.trained:
        change = start.changes.get(key)
        if isinstance(change, QuantizedWeight):
            (part,) = change.parts
            u = logarithms[key] = torch.zeros_like(part.params.scale).requires_grad_()
            steps = part.codes.double() - part.params.zero_point.repeat_interleave(16, 1)
            weight = steps * (part.params.scale * u.exp()).repeat_interleave(16, 1)
            params[key] = weight.T if name == "gpt2" else weight
        else:
            params[key] = logarithms[key] = plain.get_parameter(key).detach().clone().requires_grad_()
    logits = functional_call(plain, params, kwargs={"input_ids": ids}).logits[:, :-1]
    target = start.model(input_ids=ids).logits[:, :-1]
    expected = kl_div(log_softmax(logits, -1), log_softmax(target, -1), reduction="sum", log_target=True) / (3 * 15)
    expected.backward()
    assert math.isclose(found, expected.item(), rel_tol=1e-10)
    for key, each in student.trained.items():
        ((param),) = each.parameters
        wanted = logarithms[key].grad
        assert param.grad is not None and wanted is not None
        assert torch.allclose(param.grad, wanted, rtol=1e-8, atol=1e-12), key


def test_the_start_is_kept_where_every_step_makes_it_worse() -> None:
    start = compressed()
    with pytest.warns(UserWarning, match=r"no step has lowered the loss of .* on held-out windows"):
        found = ptq.refine(start, text(), steps=3, lr=100.0, vector_lr=100.0)
    assert_same_changes(found, start)


def test_what_tells_which_parameters_are_best_was_not_rounded_on() -> None:
    """Compression that learns is rounding and learning on seven eighths of the text, and a choice by the last one."""
    learned, chosen = text()[:42], text()[42:]
    start = ptq.compress(shaken(MODELS["llama"]()), learned, bits=2, group_size=16)
    batches = [{"input_ids": ids} for ids in learned.split(8)]
    choose_by = [{"input_ids": chosen}]
    expected = ptq.refine(start, batches, steps=EFFORTS["fast"].steps, windows=4, choose_by=choose_by)
    found = compressed(learn="fast")
    assert found.refined == expected.refined
    assert_same_changes(found, expected)


@pytest.mark.parametrize("sizes", [[8, 8], [5, 4, 3, 2, 1, 1], [16], [1, 15], [2], [1, 1]])
def test_the_last_eighth_is_set_aside(sizes: list[int]) -> None:
    ids = torch.arange(sum(sizes))[:, None]
    learned, chosen = refine.set_aside([{"input_ids": part} for part in ids.split(sizes)])
    found = [torch.cat([batch["input_ids"] for batch in batches]) for batches in (learned, chosen)]
    count = max(1, len(ids) // 8)
    assert torch.equal(found[0], ids[:-count]) and torch.equal(found[1], ids[-count:])
    assert all(len(batch["input_ids"]) for batch in [*learned, *chosen])


def test_what_tells_which_parameters_are_best_is_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        seen.extend((int(first), torch.is_grad_enabled()) for first in targets[:, 0])
        return losses.next_token_loss(logits, targets)

    monkeypatch.setitem(losses.LOSSES, "next-token", loss)
    ids = token_ids(16, 16)
    ids[:, 1] = torch.arange(16)
    ptq.refine(compressed(), ids, steps=8, loss="next-token")
    learned, held_out = ({first for first, learns in seen if learns is which} for which in (True, False))
    assert learned == set(range(14)) and held_out == {14, 15}


def test_a_texts_own_tokens_are_predicted_better() -> None:
    start, ids = compressed(), token_ids(1, 16).repeat(16, 1)
    found = ptq.refine(start, ids, steps=20, lr=1e-2, vector_lr=1e-2, loss="next-token")
    losses = [ptq.mean_loss(each.compressed_model(), ids[:2]) for each in (start, found)]
    assert losses[1] < 0.9 * losses[0]
    assert found.refined is not None and math.isclose(losses[1], found.refined.best, rel_tol=0.02)


@pytest.mark.parametrize("broken", [{2, 5}, set(range(3, 100))])
def test_steps_that_are_not_finite_are_dropped(broken: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        found = losses.next_token_loss(logits, targets)
        return found * math.nan if torch.is_grad_enabled() and calls in broken else found

    monkeypatch.setitem(losses.LOSSES, "next-token", loss)
    ids, steps = token_ids(1, 16).repeat(16, 1), []
    with pytest.warns(UserWarning, match=f"{min(len(broken), 5)} steps were dropped"):
        found = ptq.refine(compressed(), ids, steps=12, loss="next-token", looks=12, see=steps.append)
    assert found.refined is not None and found.refined.kept and found.refined.dropped == min(len(broken), 5)
    assert calls == (12 if len(broken) == 2 else 7)
    assert {step.step for step in steps[1:] if math.isnan(step.loss)} == {i for i in broken if i <= calls}
    assert bool(torch.isfinite(quantized(found, "model.layers.0.mlp.up_proj").dequantize()).all())


def test_the_same_seed_gives_the_same_bytes() -> None:
    start, ids = compressed(), text()
    found = [ptq.refine(start, ids, steps=8, seed=seed) for seed in (0, 0, 1)]
    assert_same_changes(found[0], found[1])
    weights = [quantized(each, "model.layers.0.mlp.up_proj").dequantize() for each in found]
    assert not torch.equal(weights[0], weights[2])


def test_logits_are_there_of_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "LOGITS", 96 * 8)
    start, tokens = compressed(), []
    start.probe = None  # which is of a whole sequence
    head: Any = start.source.model.get_submodule("lm_head")
    head.register_forward_hook(lambda module, args, output: tokens.append(output.shape[:2].numel()))
    most = []
    for samples in (24, 48):  # the student's head is a copy, hook and all
        tokens.clear()
        ptq.refine(start, text()[:samples], steps=8)
        most.append(max(tokens))
    assert most == [8, 8]


def test_padding_does_not_count() -> None:
    found = []
    for filler in (0, 5):
        ids, mask = text(), torch.ones(48, 32, dtype=torch.int64)
        mask[:, 24:] = 0
        ids[:, 24:] = filler
        batches = [{"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8]} for i in range(0, 48, 8)]
        found.append(ptq.refine(compressed(), batches, steps=8))
    assert_same_changes(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refined_model_is_exported_and_verified(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model: Any = shaken(MODELS["qwen2"]()).to(dtype)
    model.save_pretrained(tmp_path / "model")
    source = ptq.Checkpoint(tmp_path / "model")
    start = ptq.compress(source, text(), bits=2, group_size=16)
    found = ptq.refine(start, text(), steps=12, vector_lr=2e-3, biases=True)
    assert changed_vectors(found) == {
        name for name, param in model.named_parameters() if param.dim() == 1 and name.endswith(("weight", "bias"))
    }
    out = ptq.export(found, tmp_path / "out")
    verification = ptq.verify(out)
    assert verification.is_right, verification
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    expected = found.compressed_model()
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(loaded.get_parameter(name), expected.get_parameter(name))
        assert not torch.equal(loaded.get_parameter(name), model.get_parameter(name))


def test_a_compression_learns_where_its_recipe_says_so(tmp_path: Path) -> None:
    steps: list[Any] = []
    model, ids = shaken(MODELS["llama"]()), text()
    options: dict[str, Any] = {"bits": 2, "group_size": 16, "held_out": ids[:4]}
    found = ptq.compress(model, ids, learn="fast", see_step=steps.append, **options)
    before = ptq.compress(model, ids, **options)
    assert found.refined is not None and steps[-1].step == found.refined.steps == 16
    assert found.quality and before.quality and found.quality.kl_divergence < before.quality.kl_divergence
    assert math.isclose(found.quality.perplexity, before.quality.perplexity, rel_tol=1e-6)


def test_arguments_are_checked() -> None:
    start, ids = compressed(), token_ids(4, 16)
    for options, message in [
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"windows": 0}, "windows must be an integer of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"vector_lr": math.nan}, "vector_lr must be a positive number, got nan"),
        ({"looks": 0}, "looks must be an integer of at least 1, got 0"),
        ({"loss": "mse"}, "loss must be one of kl, next-token, got 'mse'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ptq.refine(start, ids, **options)
    with pytest.raises(
        ValueError, match="learning takes 2 sequences of text at least, one of them to choose by, got 1"
    ):
        ptq.refine(start, ids[:1])
    with pytest.raises(ValueError, match="learn is for causal language models: it must be 'none' for the task <Mock"):
        ptq.compress(start.model, ids, learn="fast", task=Mock(ptq.Task, batches=CausalLM().batches))
    with pytest.raises(ValueError, match="learn must be one of none, fast, balanced, best, got 'much'"):
        ptq.Recipe(learn="much")


def test_models_without_logits_are_refused() -> None:
    model: nn.Module = MODELS["llama"]()
    start = ptq.compress(model.get_submodule("model"), token_ids(), bits=4, group_size=16)
    assert find_blocks(start.model)[0] == "layers"
    with pytest.raises(ValueError, match="LlamaModel puts out no logits"):
        ptq.refine(start, token_ids())


def test_memory_that_will_not_do_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start, steps = compressed(), []
    fixed, of_windows = need.need(start.model, 4, 32, in_memory=True)
    monkeypatch.setattr(need, "machine_memory", lambda: fixed + 0.6 * of_windows)

    def refused(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(refine, "Student", refused)
    with pytest.warns(
        UserWarning, match=r"learning takes about 0.6 GB of memory.* 4 windows of a step, of which 2 would"
    ):
        with pytest.raises(KeyboardInterrupt):
            ptq.refine(start, text(), see=steps.append)
    assert not steps


def test_windows_of_which_no_token_counts_teach_nothing() -> None:
    start, mask = compressed(), torch.zeros(16, 32, dtype=torch.int64)
    mask[:, 0] = 1
    with pytest.warns(UserWarning, match=r"no step has lowered the loss of 0\.0000 on held-out windows"):
        found = ptq.refine(start, [{"input_ids": text()[:16], "attention_mask": mask}], steps=2)
    assert_same_changes(found, start)
