"""Models in one dtype that are to be computed in another, and layers whose dtype is not the others'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import WINDOWS
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.cli.main import main

pytest.importorskip("compressed_tensors")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:not every server runs"),
]
DOWN = "model.layers.1.mlp.down_proj"


def compress(model: Path, folder: Path, output: Path, *arguments: str) -> int:
    text = str(folder / "text.txt")
    return main(["compress", str(model), "--calibration", text, "--output", str(output), *WINDOWS, *arguments])


@pytest.fixture
def too_large(folder: Path, tmp_path: Path) -> Path:
    """In float16, in which the last block's output is infinite."""
    model: Any = MODELS["llama"]().half()
    for name in ("gate_proj", "up_proj"):
        model.model.layers[1].mlp.get_submodule(name).weight.data *= 3000
    model.model.layers[1].mlp.down_proj.weight.data *= 100
    model.save_pretrained(tmp_path / "model")
    for file in folder.glob("llama/tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


def test_activations_beyond_float16_are_refused_by_block_before_the_work(
    too_large: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(too_large, folder, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "what comes out of model.layers.1 is not finite: its activations are too large for float16" in captured.err
    assert "--dtype bfloat16 or float32" in captured.err and " of 14: " not in captured.out
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_activations_that_only_the_text_makes_too_large_name_their_layer() -> None:
    model: Any = MODELS["llama"]().half()
    ids = token_ids()
    with torch.no_grad():  # one token, behind those of the rehearsal, and a block that adds thousands to all
        model.model.layers[0].mlp.up_proj.weight *= 1000
        model.model.layers[0].mlp.down_proj.weight *= 3000
        model.model.embed_tokens.weight[95] = 65500
        ids[ids == 95] = 0
        ids[-1, -1] = 95
    with pytest.raises(ValueError, match=r"model\.layers\.\d.*: an input is not finite: .* too large for float16"):
        ptq.compress(model, ids, group_size=16)


@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_computed_in_another_dtype_it_is_loaded_in_that(
    format: str, dtype: str, too_large: Path, folder: Path, tmp_path: Path
) -> None:
    arguments = ["--dtype", dtype, "--format", format, "--bias-correction", "sequential"]
    assert compress(too_large, folder, tmp_path / "out", *arguments) == 0  # and verified
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")  # as servers do
    assert model.dtype == getattr(torch, dtype)
    assert bool(model(token_ids()).logits.isfinite().all())
    had, has = (json.loads((path / "config.json").read_text()) for path in (too_large, tmp_path / "out"))
    of_dtypes = {name for name in had if had[name] != has[name]} - {"attention_bias", "mlp_bias"}
    assert of_dtypes == {"dtype"} and has["dtype"] == dtype
    before, after = (load_file(path / "model.safetensors") for path in (too_large, tmp_path / "out"))
    assert after["model.embed_tokens.weight"].dtype == torch.float16
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    changed = after[f"{DOWN}.{'weight' if format == 'dense' else 'weight_scale'}"]
    assert changed.dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "out" / "opt8bit" / "recipe.json").read_text())["dtype"] == dtype


def test_a_checkpoint_takes_floating_dtypes(too_large: Path) -> None:
    assert ptq.Checkpoint(too_large, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert ptq.Checkpoint(too_large).model.dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, .* got torch\.int8"):
        ptq.Checkpoint(too_large, dtype=torch.int8)


@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "gptq"])
def test_a_layer_that_is_stored_in_another_dtype_is_compressed_as_it_is_loaded(
    format: str, folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in (folder / "llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    verify = ["--no-verify"] if format == "gptq" else []  # which needs GPTQModel
    assert compress(source, folder, tmp_path / "out", "--format", format, *verify) == 0


def test_biases_that_change_are_stored_in_the_dtype_that_is_computed_in(tmp_path: Path) -> None:
    model: Any = MODELS["qwen2"]().half()
    model.save_pretrained(tmp_path / "model")
    source = ptq.Checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    result = ptq.compress(source, token_ids(), group_size=16, bias_correction="sequential")
    out = ptq.export(result, tmp_path / "out", format="dense")
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16  # corrected
    assert stored["model.layers.0.self_attn.k_proj.bias"].dtype == torch.float16  # as it was
    assert ptq.verify(out).is_right
