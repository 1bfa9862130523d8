"""Checkpoints read block by block: the same bits as loading them whole, and damage is named."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import MODELS, assert_same_changes, token_ids

from opt8bit import ptq
from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.model.checkpoint_files import INDEX
from opt8bit.ptq.model.skeleton import OnlyWhole
from opt8bit.ptq.model.source import Checkpoint, InMemory, LoadedCheckpoint, digest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model: Any = MODELS[name]().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def whole(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_those_of_the_whole_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model", dtype, max_shard_size="20KB")
    assert (folder / INDEX).is_file()
    expected, source = whole(folder), Checkpoint(folder)
    exact, found = dict(InMemory(expected).tensors()), dict(source.tensors())
    assert exact.keys() == found.keys()
    assert all(torch.equal(exact[key], value) and exact[key].dtype == value.dtype for key, value in found.items())
    prefix, blocks = find_blocks(source.model)
    for i, block in enumerate(blocks):
        assert all(param.is_meta for param in block.parameters())
        with source.block(f"{prefix}.{i}") as there:
            assert there is block and not any(param.is_meta for param in block.parameters())
        assert all(param.is_meta for param in block.parameters())
    with torch.no_grad():
        assert torch.equal(source.copy()(token_ids()).logits, expected(token_ids()).logits)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "falcon"])
def test_compressing_block_by_block_gives_the_same(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model")
    options: dict[str, Any] = {"bits": 3, "group_size": 16, "bias_correction": "sequential", "held_out": token_ids(3)}
    expected = ptq.compress(whole(folder), token_ids(), **options)
    found = ptq.compress(Checkpoint(folder), token_ids(), **options, work=tmp_path / "work")
    assert_same_changes(found, expected)
    assert found.quality == expected.quality and found.quality is not None
    ptq.export(found, tmp_path / "found", format="dense")
    ptq.export(expected, tmp_path / "expected", format="dense")
    for file in ("model.safetensors", "opt8bit/probe.safetensors"):
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_damage_is_named(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    for change, message in (
        (lambda path: (path / shards[1].name).unlink(), f"{shards[1].name} is missing or damaged"),
        (lambda path: _truncate(path / shards[1].name), f"{shards[1].name} is missing or damaged"),
        (lambda path: (path / shards[0].name).write_bytes(b"nothing"), f"{shards[0].name} is missing or damaged"),
        (lambda path: (path / INDEX).write_text("{"), f"{INDEX} is damaged"),
        (lambda path: (path / INDEX).unlink(), "has neither model.safetensors nor"),
        (lambda path: _drop_one(path / shards[2].name), f"lacks .*, which {INDEX} says it has"),
        (_reshape_one, r"is \(3, 3\), the model's is \(96, 32\)"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(ValueError, match=message):
            Checkpoint(copy)
        shutil.rmtree(copy)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _drop_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors or {"other": torch.zeros(1)}, path)


def _reshape_one(folder: Path) -> None:
    where = json.loads((folder / INDEX).read_text())["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(folder / where)
    save_file({**tensors, "model.embed_tokens.weight": torch.zeros(3, 3)}, folder / where)


def test_models_that_are_quantized_are_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantized already, by gptq: compress the original"):
        Checkpoint(str(folder))
    model: Any = MODELS["llama"]()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="quantized already, by gptq: compress the original"):
        ptq.compress(model, token_ids())


def test_names_that_only_transformers_knows_are_told_apart(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"other.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(OnlyWhole, match="the checkpoint has no "):
        Checkpoint(folder)


def test_a_digest_is_of_bytes_shape_and_dtype() -> None:
    ones = torch.ones(4)
    assert digest([ones]) == digest([ones.clone()])
    others = [torch.ones(2, 2), torch.ones(4, dtype=torch.int32), torch.zeros(4), torch.ones(0)]
    assert len({digest([tensor]) for tensor in [ones, *others]}) == 5


def test_models_that_compute_with_their_weights_when_they_are_built_are_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from opt8bit.cli.models import open_model

    folder = saved("llama", tmp_path / "model")
    build = transformers.LlamaForCausalLM.__init__

    def computes(self: Any, config: Any) -> None:
        build(self, config)
        float(self.lm_head.weight.sum())

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", computes)
    with pytest.raises(OnlyWhole, match="cannot be built without its weights"):
        Checkpoint(folder)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", build)
    monkeypatch.setattr("opt8bit.cli.models.Checkpoint", _only_whole)
    source = open_model(str(folder))
    assert isinstance(source, LoadedCheckpoint) and source.files is not None
    exact = load_file(folder / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in source.tensors()} == {k: v.tolist() for k, v in exact.items()}


def _only_whole(*args: Any, **options: Any) -> None:
    raise OnlyWhole("cannot be built without its weights")
