"""Checkpoints that lack weights, or are no causal language model's, are refused before anything is done."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALL
from torch import nn
from toys import MODELS, assert_same_changes, token_ids

from opt8bit import ptq
from opt8bit.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def assert_refused(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *messages: str
) -> None:
    """By both commands, with one sentence."""
    text = str(folder / "text.txt")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "llama" / file, model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    compress = ["compress", str(model), "--calibration", text, "--output", str(tmp_path / "out"), *SMALL]
    for command in (compress, ["evaluate", str(model), "--text", text, "--samples", "2", "--sequence-length", "16"]):
        assert main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]  # after transformers' own lines
        assert error.startswith("opt8bit") and all(message in error for message in messages), error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "llama", tmp_path / "model"))


def test_weights_that_are_missing_are_not_made_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copied(folder, tmp_path)
    tensors = load_file(model / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        del tensors[name]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = "the checkpoint lacks 2 of the model's weights, model.layers.0.self_attn.k_proj.weight first"
    assert_refused(model, folder, tmp_path, capsys, message)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module."])
def test_wrappers_names_are_told(prefix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied(folder, tmp_path)
    tensors = load_file(model / "model.safetensors")
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"}
    )
    message = f"lacks {len(tensors)} of the model's weights, lm_head.weight first: its names begin with '{prefix}'"
    assert_refused(model, folder, tmp_path, capsys, message, "save")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaModel"])
def test_other_classes_are_named(
    name: str, tied: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tied embeddings are a head that no model of another class was trained with."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder / "llama")
    config.tie_word_embeddings = tied
    getattr(transformers, name)(config).save_pretrained(tmp_path / "model")
    message = f"the model is a {name}, which is no causal language model"
    assert_refused(tmp_path / "model", folder, tmp_path, capsys, message)


def test_adapters_are_to_be_merged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied(folder, tmp_path)
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert_refused(model, folder, tmp_path, capsys, "has an adapter, adapter_config.json: merge it into its base")


def test_the_model_within_a_compiled_one_is_compressed() -> None:
    model = MODELS["llama"]()
    options: dict[str, Any] = {"bits": 3, "group_size": 16}
    expected = ptq.compress(model, token_ids(), **options)
    compiled: Any = torch.compile(model)
    found = ptq.compress(compiled, token_ids(), **options)
    assert_same_changes(found, expected)


def test_a_model_with_adapters_is_refused() -> None:
    class PeftModel(nn.Module):  # as PEFT's is
        peft_config = None

        def merge_and_unload(self) -> None: ...

    with pytest.raises(
        ValueError, match=r"PeftModel has adapters: merge them first, model = model.merge_and_unload\(\)"
    ):
        ptq.compress(PeftModel(), token_ids(), bits=3)
