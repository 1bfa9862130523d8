"""The folder that is written is the source's folder with the weights changed: nothing is lost, added or reworded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import WINDOWS, loaded
from toys import token_ids

from opt8bit import ptq
from opt8bit.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:not every server runs"),  # what is as small as here
]

FORMATS = ("dense", "compressed-tensors")
BESIDE = {  # what lies beside weights, and stays as it is
    "README.md": b"# A model\r\n",
    "LICENSE": b"Everybody may use it.",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"do_sample": true, "temperature":0.70}',
    "preprocessor_config.json": b"{}",
    "modules.json": b"[ ]",
    "1_Pooling/config.json": b'{"word_embedding_dimension": 32}',
    "2_Dense/model.safetensors": b"weights of another module",
    "modeling_own.py": b"raise RuntimeError('never run')\n",
}
OF_OTHERS = ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", ".cache/refs", "opt8bit/report.json")


def compress(model: Path, folder: Path, output: Path, *arguments: str) -> Path:
    text = str(folder / "text.txt")
    command = ["compress", str(model), "--calibration", text, "--output", str(output), "--bits", "8", *WINDOWS]
    assert main([*command, *arguments]) == 0
    return output


def rewrite(file: Path, **changes: Any) -> dict[str, Any]:
    """Changes the entries of a JSON file; those that become None disappear."""
    content = {name: value for name, value in json.loads(file.read_text()).items() if name not in changes}
    content |= {name: value for name, value in changes.items() if value is not None}
    file.write_text(json.dumps(content, indent=4))
    return content


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> Path:
    model = Path(shutil.copytree(folder / "llama", tmp_path / "model"))
    for name, content in BESIDE.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
    for name in OF_OTHERS:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"of others")
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_is_the_sources(format: str, source: Path, folder: Path, tmp_path: Path) -> None:
    words = {"rope_parameters": None, "rope_theta": 5000.0, "torch_dtype": "float32", "dtype": None}
    config = rewrite(source / "config.json", **words, transformers_version="4.40.1", of_our_own={"é": [1]})
    output = compress(source, folder, tmp_path / "out", "--format", format)
    written = json.loads((output / "config.json").read_text())
    assert (written.pop("quantization_config", None) is None) == (format == "dense")
    assert written == config and list(written) == list(config)
    kept = {*BESIDE, *(path.name for path in source.iterdir() if "token" in path.name)}
    assert {"tokenizer.json", "tokenizer_config.json"} <= kept
    for name in kept:
        there = "BASE_README.md" if name == "README.md" else name  # beside the card of what was made
        assert (output / there).read_bytes() == (source / name).read_bytes(), name
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    made = {"config.json", "model.safetensors", "BASE_README.md"}
    assert {name for name in files if not name.startswith("opt8bit/")} == {*kept, *made}
    assert "report.json" in {path.name for path in (output / "opt8bit").iterdir()}


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_llamas_of_another_name_keep_their_words(model_type: str, folder: Path, tmp_path: Path) -> None:
    from toys import MODELS

    source = tmp_path / "model"
    model: Any = MODELS["qwen2" if model_type == "qwen2" else "mistral-full"]()
    model.save_pretrained(source)
    shutil.copy(folder / "llama" / "tokenizer.json", source)
    shutil.copy(folder / "llama" / "tokenizer_config.json", source)
    config = rewrite(source / "config.json", rope_parameters=None, rope_theta=5000.0, of_our_own=1)
    output = compress(source, folder, tmp_path / "out", "--format", "dense", "--bias-correction", "sequential")
    written = json.loads((output / "config.json").read_text())
    assert written["model_type"] == "llama" and written["architectures"] == ["LlamaForCausalLM"]
    assert written["attention_bias"] is written["mlp_bias"] is True
    assert written["rope_theta"] == 5000.0 and written["of_our_own"] == 1 and "rope_parameters" not in written
    assert "use_sliding_window" not in written and written["transformers_version"] == config["transformers_version"]
    assert written["rms_norm_eps"] == config["rms_norm_eps"] and "_name_or_path" not in written


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_without_a_place_are_kept(format: str, source: Path, folder: Path, tmp_path: Path) -> None:
    others = {
        "vision_tower.layers.0.q_proj.weight": torch.randn(8, 8, dtype=torch.bfloat16),
        "model.mtp.0.norm.weight": torch.ones(7),
        "model.layers.0.self_attn.q_proj.lora_scale": torch.tensor(3, dtype=torch.int32),
    }
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, **others}, source / "model.safetensors", {"format": "pt"})
    output = compress(source, folder, tmp_path / "out", "--format", format)
    found = load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in others.items())
    if format != "dense":
        ignored = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
        assert {"lm_head", "vision_tower.layers.0.q_proj"} <= set(ignored)
    verification = ptq.verify(output)
    assert verification.is_right and not verification.dropped
    del found["model.mtp.0.norm.weight"]
    save_file(found, output / "model.safetensors", {"format": "pt"})
    assert ptq.verify(output).differences == ["model.mtp.0.norm.weight is lost"]


def test_tensors_keep_their_dtypes(source: Path, folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    exact = "model.layers.0.input_layernorm.weight"
    tensors[exact] = tensors[exact].float() + 1e-5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    rewrite(source / "config.json", dtype="bfloat16")
    output = compress(source, folder, tmp_path / "out", "--format", "dense")
    found = load_file(output / "model.safetensors")
    assert found.keys() == tensors.keys() and all(found[name].dtype == value.dtype for name, value in tensors.items())
    assert torch.equal(found[exact], tensors[exact])
    found[exact] = found[exact].bfloat16()
    save_file(found, output / "model.safetensors", {"format": "pt"})
    (difference,) = ptq.verify(output).differences
    assert difference == f"{exact} is BF16 (32,), F32 (32,) in the source"


@pytest.mark.parametrize("stored", [["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]], ids=len)
def test_a_tied_head_keeps_its_names(stored: list[str], source: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    del tensors["model.embed_tokens.weight"]
    tensors |= {name: head.clone() for name in stored}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    rewrite(source / "config.json", tie_word_embeddings=True)
    output = compress(source, folder, tmp_path / "out", "--format", "dense")
    found = load_file(output / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], head) for name in stored)
    with torch.no_grad():
        assert torch.equal(loaded(output).lm_head.weight, head)


def test_a_tokenizer_that_cannot_be_loaded_is_told(source: Path, folder: Path, tmp_path: Path) -> None:
    output = compress(source, folder, tmp_path / "out", "--format", "dense")
    (output / "tokenizer.json").write_text("{}")
    (difference,) = ptq.verify(output).differences
    assert difference.startswith("the tokenizer cannot be loaded: ")


def test_models_in_memory_are_written_in_words_that_all_versions_read(tmp_path: Path) -> None:
    import transformers
    from toys import GATED

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = transformers.LlamaConfig(**GATED, **rotary(rope))
    result = ptq.compress(transformers.LlamaForCausalLM(config).eval(), token_ids(), group_size=16)
    output = ptq.export(result, tmp_path / "out", format="dense")
    written = json.loads((output / "config.json").read_text())
    assert written["rope_theta"] == 5000.0
    assert written["rope_scaling"]["rope_type"] == "linear" and written["rope_scaling"]["factor"] == 2.0
    assert ptq.verify(output).is_right


def rotary(rope: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a rotary embedding, as the installed version of transformers takes them."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": rope}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": {name: rope[name] for name in ("rope_type", "factor")}}
