"""Checkpoints: what was compressed is what is loaded, and nothing half-written is left."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import MODELS, quantized, token_ids

from opt8bit import ptq
from opt8bit.ptq.export.folder import new_folder
from opt8bit.ptq.export.shards import write_shards
from opt8bit.ptq.plan import polished
from opt8bit.quant import CodebookGrid, normal_float
from opt8bit.quant.packing import pack

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    return loaded


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("correct", [pytest.param("none", marks=pytest.mark.slow), "sequential"])
def test_dense_loads_as_the_compressed_model(name: str, correct: str, tmp_path: Path) -> None:
    result = ptq.compress(MODELS[name](), token_ids(), bits=3, group_size=16, bias_correction=correct)
    path = ptq.export(result, tmp_path / "out", format="dense")
    loaded, info = load(path)
    assert not any(info.values())
    with torch.no_grad():
        expected = result.compressed_model()(token_ids()).logits
        assert torch.equal(loaded.eval()(token_ids()).logits, expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("symmetric", [True, False, "restricted"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_compressed_tensors_load_bit_for_bit(
    bits: int, symmetric: bool | str, group_size: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    model: Any = MODELS["llama"]()
    rotary = model.model.rotary_emb.inv_freq
    model.to(dtype).model.rotary_emb.inv_freq = rotary  # as loaders have it
    result = ptq.compress(
        model, token_ids(), bits=bits, group_size=group_size, symmetric=symmetric, bias_correction="joint"
    )
    path = ptq.export(result, tmp_path / "out")
    scales = [tensor for name, tensor in load_file(path / "model.safetensors").items() if name.endswith("weight_scale")]
    assert scales and all(bool((scale < 0).any()) == (symmetric is True) for scale in scales)
    loaded, info = load(path)
    assert not any(info.values()) and loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_ids()).logits, result.compressed_model()(token_ids()).logits)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "name", ["opt", "bloom", "llama", "mistral", "mistral-full", "qwen2", "qwen3", "falcon", "gemma2"]
)
@pytest.mark.parametrize("correct", ["none", "sequential"])
def test_compressed_tensors_of_every_type(name: str, correct: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    result = ptq.compress(MODELS[name](), token_ids(), bits=4, group_size=16, symmetric=True, bias_correction=correct)
    loaded, info = load(ptq.export(result, tmp_path / "out"))
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_ids()).logits, result.compressed_model()(token_ids()).logits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_words_are_those_of_the_package(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(2**bits, (7, 48), generator=torch.Generator().manual_seed(0))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes.to(torch.uint8), bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.parametrize("symmetric", [True, "restricted"])
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqs_format_holds_the_codes(bits: int, group_size: int | None, symmetric: bool | str, tmp_path: Path) -> None:
    result = ptq.compress(MODELS["llama"](), token_ids(), bits=bits, group_size=group_size, symmetric=symmetric)
    path = ptq.export(result, tmp_path / "out", format="gptq")
    tensors = load_file(path / "model.safetensors")
    expected = {"bits": bits, "group_size": group_size or -1, "sym": True, "desc_act": False}
    assert json.loads((path / "config.json").read_text())["quantization_config"].items() >= expected.items()
    for name in (row.name for row in result.report):
        words, zeros, scales, index = (tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx"))
        outputs = words.shape[1]
        per_word = 32 // bits
        shifts = torch.arange(per_word) * bits
        codes = (words[:, None] >> shifts[:, None] & (2**bits - 1)).flatten(0, 1)  # (in, out)
        zero = (zeros[..., None] >> shifts & (2**bits - 1)).flatten(1)  # (groups, out)
        assert bool((scales < 0).any()) == (symmetric is True) and (zero + 1 == 2 ** (bits - 1)).all()
        weight = scales[index.long()] * (codes - (zero + 1)[index.long()])
        assert weight.shape[1] == outputs and torch.equal(weight.T, quantized(result, name).dequantize())


def test_formats_say_what_they_cannot_hold(tmp_path: Path) -> None:
    llama, ids = MODELS["llama"](), token_ids()
    cases: list[tuple[ptq.Result, str, str]] = [
        (ptq.compress(llama, ids, group_size=16), "gptq", "served at 4 and 8 bits, symmetric, got 4 bits, asymmetric"),
        (ptq.compress(llama, ids, bits=3, group_size=16, symmetric=True), "gptq", "got 3 bits, symmetric"),
        (ptq.compress(llama, ids, method=ptq.OutlierQuantEase(), group_size=16), "compressed-tensors", "kept exact"),
        (
            ptq.compress(llama, ids, grid=CodebookGrid(normal_float(4)), group_size=16),
            "compressed-tensors",
            "evenly spaced values alone",
        ),
        (ptq.compress(MODELS["gpt2"](), ids, group_size=16), "compressed-tensors", "nn.Linear alone, got Conv1D"),
        (
            ptq.compress(llama, ids, group_size=16, symmetric=True, overrides={"*.down_proj": {"bits": 8}}),
            "gptq",
            "one width and one group size",
        ),
    ]
    mixed = ptq.compress(llama, ids, group_size=16, overrides={"*.down_proj": {"bits": 8}})
    left = ptq.compress(llama, ids, group_size=16, symmetric=True, overrides={"*.1.*": None})
    cases.append((left, "gptq", "model.layers.1.self_attn.q_proj: gptq has no word for layers that stay as they are"))
    cases.append((mixed, "compressed-tensors", "several widths or group sizes where all grids are symmetric"))
    for result, format, message in cases:
        with pytest.raises(ValueError, match=message):
            ptq.export(result, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_what_a_format_cannot_hold_is_refused_before_the_work(format: str) -> None:
    seen: list[ptq.LayerReport] = []
    for method in (ptq.OutlierQuantEase(0.1), polished(ptq.OutlierQuantEase(0.1))):
        with pytest.raises(
            ValueError, match=r"layers.0.self_attn.q_proj: .* has no place for weights that are kept exact"
        ):
            ptq.compress(
                MODELS["llama"](),
                token_ids(),
                method=method,
                group_size=16,
                symmetric=True,
                checkpoint_format=format,
                see=lambda report, count: seen.append(report),
            )
    assert not seen


def test_a_configuration_of_generation_is_written_as_it_is(tmp_path: Path) -> None:
    model: Any = MODELS["llama"]()
    model.generation_config.temperature = 0.5  # without do_sample: save_pretrained refuses it
    result = ptq.compress(model, token_ids(), group_size=16, checkpoint_format="dense")
    loaded, _ = load(ptq.export(result, tmp_path / "out", format="dense"))
    assert loaded.generation_config.temperature == 0.5


def test_configurations_that_cannot_be_saved_or_read_are_refused_before_the_work() -> None:
    model: Any = MODELS["llama"]()
    model.generation_config.early_stopping = "soon"
    with pytest.raises(ValueError, match="soon"):
        ptq.compress(model, token_ids(), group_size=16, checkpoint_format="dense")
    model = MODELS["llama"]()
    model.config.temperature = 0.5
    with pytest.raises(ValueError, match="generation parameters are set in the model config"):
        ptq.compress(model, token_ids(), group_size=16, checkpoint_format="dense")


def test_groups_without_positive_weights_are_packed_right(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model: Any = MODELS["llama"]()
    rotary = model.model.rotary_emb.inv_freq
    model.to(torch.bfloat16).model.rotary_emb.inv_freq = rotary
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.abs_().neg_()
    result = ptq.compress(model, token_ids(), bits=8, group_size=16)
    loaded, _ = load(ptq.export(result, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_ids()).logits, result.compressed_model()(token_ids()).logits)


@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
def test_layers_left_as_they_are_and_mixed_widths_load(format: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    overrides = {"*.down_proj": {"bits": 8, "group_size": 32}, "*.o_proj": None, "*.1.mlp.*": {"method": ptq.RTN()}}
    result = ptq.compress(
        MODELS["llama"](), token_ids(), group_size=16, symmetric=True, bias_correction="joint", overrides=overrides
    )
    assert not any("o_proj" in row.name for row in result.report) and len(result.report) == 12
    loaded, info = load(ptq.export(result, tmp_path / "out", format=format))
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_ids()).logits, result.compressed_model()(token_ids()).logits)


@pytest.mark.parametrize("limit", [1, 3000, 20000])
def test_shards_and_their_index_hold_everything(limit: int, tmp_path: Path) -> None:
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float16, torch.int32, torch.bool]
    tensors = {f"t{i}": torch.arange(i * 101).to(dtype) for i, dtype in enumerate(dtypes, 1)}
    tensors["scalar"], tensors["empty"] = torch.tensor(3.5), torch.empty(0, 4)
    tensors["transposed"] = torch.arange(12.0).view(3, 4).T
    total = write_shards(iter(tensors.items()), tmp_path, limit)
    assert total == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = tmp_path / "model.safetensors.index.json"
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    if limit == 20000:
        assert files == {"model.safetensors"} and not index.exists()
    else:
        where = json.loads(index.read_text())["weight_map"]
        assert set(where.values()) == files and where.keys() == tensors.keys() and len(files) > 2
    found = {name: value for file in files for name, value in load_file(tmp_path / file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.data")]


def test_switches_are_on_only_for_biases_that_are_there(tmp_path: Path) -> None:
    for correct, on in (("none", False), ("joint", True)):
        result = ptq.compress(MODELS["llama"](), token_ids(), bits=3, group_size=16, bias_correction=correct)
        path = ptq.export(result, tmp_path / correct, format="dense")
        config = json.loads((path / "config.json").read_text())
        assert config["attention_bias"] is config["mlp_bias"] is on


@pytest.mark.parametrize("name", ["mistral-full", "qwen2"])
def test_llamas_of_another_name_are_written_as_llamas_for_their_biases(name: str, tmp_path: Path) -> None:
    for correct, architecture in (("none", None), ("joint", "LlamaForCausalLM")):
        result = ptq.compress(MODELS[name](), token_ids(), bits=3, group_size=16, bias_correction=correct)
        config = json.loads((ptq.export(result, tmp_path / correct, format="dense") / "config.json").read_text())
        assert config["architectures"] == [architecture or type(result.model).__name__]
        assert (config["model_type"] == "llama") == (correct == "joint")


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    result = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="out exists: give the name of a folder that does not"):
        ptq.export(result, tmp_path / "out", format="dense")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    result = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "config.json").is_file() and not (tmp_path / "out").exists()
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        ptq.export(result, tmp_path / "out", format="dense", tokenizer=Tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_folders_made_on_the_way_go_with_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "c"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="name too long"), new_folder(tmp_path / "a" / ("b" * 250)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_result_is_kept_where_somebody_else_has_taken_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(FileExistsError, match=r"somebody else has made .* the result is in"),
        new_folder(tmp_path / "a") as folder,
    ):
        (folder / "file").write_text("x")
        (tmp_path / "a").mkdir()
    assert (tmp_path / ".a.partial" / "file").read_text() == "x" and not list((tmp_path / "a").iterdir())


def test_nobody_takes_a_folder_while_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = os.rename

    def rename(old: Path, new: Path) -> None:
        for resume in (False, True):
            with (
                pytest.raises(FileExistsError, match="another run is writing"),
                new_folder(tmp_path / "a", resume=resume),
            ):
                pass
        renamed(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_formats_are_checked(tmp_path: Path) -> None:
    result = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16)
    with pytest.raises(ValueError, match="format must be one of compressed-tensors, gptq, mlx, gguf, dense, got 'awq'"):
        ptq.export(result, tmp_path / "out", format="awq")
    position = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16, bias_correction="local", statistic="position")
    with pytest.raises(ValueError, match="no checkpoint can hold a bias for each position"):
        ptq.export(position, tmp_path / "out", format="dense")
    assert not list(tmp_path.iterdir())
