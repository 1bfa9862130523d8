"""Models whose blocks are read when they are needed: the same as in memory, each read once, few there at a time."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import GATED, MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.model.blocks import find_blocks, matrix
from opt8bit.ptq.model.memory import bytes_of
from opt8bit.ptq.model.running import KEPT, OnDemand, Running, running
from opt8bit.ptq.model.source import Checkpoint, InMemory
from opt8bit.ptq.pairs.batches import call
from opt8bit.quant import UniformGrid

LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(**{**GATED, "num_hidden_layers": LAYERS, "attention_bias": True})  # type: ignore[arg-type]
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def batches(count: int, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(96, (3, 12), generator=generator)} for _ in range(count)]


def calls(count: int) -> list[Any]:
    return [partial(call, batch=batch) for batch in batches(count)]


def logits(model: Running, count: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [output.logits for output in model.outputs(calls(count))]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt8bit.ptq.model.running.machine_memory", lambda: 0)


def there(model: nn.Module) -> list[int]:
    """The blocks whose matrices are in memory."""
    blocks = find_blocks(model)[1]
    return [i for i, block in enumerate(blocks) if not any(param.is_meta for param in block.parameters())]


def counted(source: Checkpoint) -> Counter[str]:
    """How often each tensor is read from now on."""
    reads, load = Counter[str](), source.load

    def counting(model: nn.Module, names: Any) -> None:
        names = list(names)
        reads.update(names)
        load(model, names)

    source.load = counting  # type: ignore[method-assign]
    return reads


def fake_quantized(model: Any) -> Any:
    result = copy.deepcopy(model)
    for name, param in result.named_parameters():
        if param.dim() == 2 and ".layers." in name:
            grid = UniformGrid(2)
            param.data = grid.nearest(param.data, grid.fit(param.data))
    return result


def test_outputs_are_those_of_the_whole_model(folder: Path) -> None:
    source = Checkpoint(folder)
    expected = logits(Running(source.copy()), 4)
    reads = counted(source)
    on_demand = OnDemand(source, KEPT)
    assert there(on_demand.model) == []
    for found, exact in zip(logits(on_demand, 4), expected, strict=True):
        assert torch.equal(found, exact)
    # Four calls side by side, and each block was read once.
    assert set(reads.values()) == {1}
    assert there(on_demand.model) == list(range(LAYERS))[-KEPT:]
    assert torch.equal(logits(on_demand, 1)[0], expected[0])  # and again, by itself
    assert all(param.is_meta for param in find_blocks(source.model)[1].parameters())


def test_few_blocks_are_there_at_a_time(folder: Path) -> None:
    on_demand = OnDemand(Checkpoint(folder), KEPT)
    most: list[int] = []
    for block in on_demand.blocks:
        block.register_forward_hook(lambda *_: most.append(len(there(on_demand.model))))
    logits(on_demand, 3)
    assert len(most) == 3 * LAYERS and max(most) == KEPT


def test_results_come_one_after_another_and_turns_are_told(folder: Path) -> None:
    for model in (OnDemand(Checkpoint(folder), KEPT), OnDemand(Checkpoint(folder)), Running(Checkpoint(folder).copy())):
        seen: list[Any] = []
        outputs = model.outputs([lambda model, i=i: (call(model, batches(1)[0]), i)[1] for i in range(3)], seen.append)
        for i, output in enumerate(outputs):
            assert output == i and seen[-1] == i  # later ones have not ended


def test_calls_may_end_early(folder: Path) -> None:
    """Not through all blocks, or through none."""
    model = OnDemand(Checkpoint(folder), KEPT)
    ways = [calls(1)[0], lambda model: "none", lambda model: calls(1)[0](model.model).last_hidden_state.shape]
    found = list(model.outputs(ways))
    assert found[1] == "none" and found[2] == (3, 12, GATED["hidden_size"])


def test_a_call_that_fails_leaves_a_model_that_runs(folder: Path) -> None:
    model = OnDemand(Checkpoint(folder), KEPT)
    expected = logits(model, 1)[0]

    def fail(model: nn.Module) -> None:
        call(model, batches(1)[0])
        raise KeyError("no such word")

    with pytest.raises(KeyError, match="no such word"):
        list(model.outputs([*calls(2), fail]))
    assert torch.equal(logits(model, 1)[0], expected)


def test_what_is_held_stays_as_it_was_changed(folder: Path) -> None:
    model = OnDemand(Checkpoint(folder), KEPT)
    blocks = find_blocks(model.model)[0]
    model.hold(f"{blocks}.1")
    layer: Any = model.model.get_submodule(f"{blocks}.1.mlp.up_proj")
    layer.weight.data.zero_()
    logits(model, 2)
    assert not layer.weight.any() and there(model.model) == [1, *range(LAYERS)[-KEPT:]]
    model.need(f"{blocks}.0.self_attn.q_proj")
    assert there(model.model) == [0, 1, LAYERS - 1]
    model.need("lm_head")  # is there all the time
    assert there(model.model) == [0, 1, LAYERS - 1]


def test_blocks_stay_where_there_is_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = bytes_of(find_blocks(Checkpoint(folder).model)[1][0])
    for blocks, expected in ((0, KEPT), (3, 3), (LAYERS, LAYERS)):
        monkeypatch.setattr("opt8bit.ptq.model.running.machine_memory", lambda blocks=blocks: 4 * blocks * size)
        model = OnDemand(Checkpoint(folder))
        logits(model, 2)
        assert there(model.model) == list(range(LAYERS))[-expected:]
        assert len(model.blocks) == (0 if expected == LAYERS else LAYERS)


def test_models_in_memory_are_as_they_are() -> None:
    model = MODELS["llama"]()
    assert running(model).model is model and not running(model).blocks
    assert running(InMemory(model)).model is model
    itself = Running(model)
    assert running(itself) is itself


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("order", ["local", "sequential"])
def test_a_reference_from_files_corrects_as_one_in_memory(folder: Path, order: str) -> None:
    source = Checkpoint(folder)
    model = source.copy()
    padded = {"input_ids": token_ids(3, 12), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    padded["attention_mask"][:, :5] = 0
    data, held_out = [*batches(4), padded], batches(3, seed=1)
    found = []
    for reference in (model, source):
        quantized = fake_quantized(model)
        correction = ptq.correct(quantized, reference, data, order=order, held_out=held_out)
        found.append((quantized.state_dict(), correction.modules, correction.held_out))
    (exact, *rest), (streamed, *rest_streamed) = found
    assert rest == rest_streamed and rest[0]
    assert all(torch.equal(value, streamed[name]) for name, value in exact.items())


@pytest.mark.usefixtures("little_memory")
def test_outputs_that_are_not_kept_are_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opt8bit.ptq.pairs import choice

    source, held_out = Checkpoint(folder), batches(4, seed=1)
    model = source.copy()
    results = []
    for kept in (choice.KEPT_BYTES, 2 * 3 * 12 * 96 * 4):  # all outputs, two of them
        monkeypatch.setattr(choice, "KEPT_BYTES", kept)
        quantized = fake_quantized(model)
        results.append(ptq.correct(quantized, source, batches(4), held_out=held_out).held_out)
    assert results[0] == results[1]


def test_a_checkpoint_is_corrected_in_files_alone(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"quantized must be an nn.Module, got Checkpoint"):
        ptq.correct(Checkpoint(folder), Checkpoint(folder), batches(1))  # type: ignore[arg-type]


def test_hooks_are_no_part_of_a_block(folder: Path) -> None:
    """Who copies a block gets a copy of it, and not of all that reads it."""
    model = OnDemand(Checkpoint(folder), KEPT)
    model.hold(f"{find_blocks(model.model)[0]}.0")
    copied = copy.deepcopy(model.blocks[0])
    hooks: Any = copied._forward_pre_hooks
    assert list(hooks.values()) == list(model.blocks[0]._forward_pre_hooks.values())
    assert matrix(copied.get_submodule("mlp.up_proj")).shape == (64, 32)
