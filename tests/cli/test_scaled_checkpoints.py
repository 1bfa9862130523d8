"""Checkpoints in fp8 and int8 are compressed as the original would be that they stand for."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scaled_checkpoints import FP8, KINDS
from small import SMALL, WINDOWS
from toys import token_ids

from opt8bit.cli.main import main
from opt8bit.ptq.model.checkpoint_files import INDEX
from opt8bit.ptq.model.source import Checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:not every server runs"),  # what is as small as here
]
LAYER = re.compile(r"(model\.layers\..*_proj)\.weight")
DROPPED = "the weights are dequantized to bfloat16, and the quantization of activations"


def written(kind: str, dense: Path, path: Path) -> tuple[Path, Path]:
    """A checkpoint of a kind, scales and codes in different files, and one of the values that it stands for."""
    scaled, plain = Path(shutil.copytree(dense, path / "scaled")), Path(shutil.copytree(dense, path / "plain"))
    tensors: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    values = {name: tensor.bfloat16() for name, tensor in load_file(dense / "model.safetensors").items()}
    for name, tensor in values.items():
        layer = LAYER.fullmatch(name)
        if layer is None:
            tensors[name] = tensor
            continue
        stored = KINDS[kind].store(tensor)
        tensors[name], values[name] = stored.tensors[""], stored.values
        beside |= {name + end: part for end, part in stored.tensors.items() if end}
        beside |= {f"{layer[1]}.{end}": torch.ones(1) for end in KINDS[kind].others}
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": beside}
    for file, inside in files.items():
        save_file(inside, scaled / file, {"format": "pt"})
    index = {name: file for file, inside in files.items() for name in inside}
    (scaled / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (scaled / "model.safetensors").unlink()
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    config = {**json.loads((dense / "config.json").read_text()), "dtype": "bfloat16"}
    (plain / "config.json").write_text(json.dumps(config))
    header = KINDS[kind].header
    in_file = "producer" in header
    (scaled / "config.json").write_text(json.dumps(config if in_file else {**config, "quantization_config": header}))
    if in_file:
        (scaled / "hf_quant_config.json").write_text(json.dumps(header))
    return scaled, plain


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_as_what_it_stands_for(kind: str, folder: Path, tmp_path: Path) -> None:
    scaled, plain = written(kind, folder / "llama", tmp_path)
    expected = Checkpoint(plain)
    with pytest.warns(UserWarning, match=DROPPED) as warnings:
        found = Checkpoint(scaled)
    assert [warning.filename for warning in warnings] == [__file__]
    tensors = dict(found.tensors())
    assert tensors.keys() == dict(expected.tensors()).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.tensors())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    models: list[Any] = [found.model, expected.model]
    configs = [model.config.to_dict() for model in models]
    assert configs[0] == {**configs[1], "_name_or_path": str(scaled)}
    with torch.no_grad():
        assert torch.equal(found.copy()(token_ids()).logits, expected.copy()(token_ids()).logits)


@pytest.mark.parametrize("kind", ["fp8-blocks", "modelopt-file", "int-asymmetric"])
def test_what_is_compressed_has_the_originals_bytes(kind: str, folder: Path, tmp_path: Path) -> None:
    scaled, plain = written(kind, folder / "llama", tmp_path)
    command = ["--calibration", str(folder / "text.txt"), *SMALL, "--bits", "3", "--method", "rtn"]
    assert main(["compress", str(plain), "--output", str(tmp_path / "expected"), *command]) == 0
    with pytest.warns(UserWarning, match=DROPPED):
        assert main(["compress", str(scaled), "--output", str(tmp_path / "found"), *command]) == 0
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert not {"quantization_config", "compression_config"} & set(
        json.loads((tmp_path / "found" / "config.json").read_text())
    )
    assert not list((tmp_path / "found").glob("hf_quant*"))
    output, original = load_file(tmp_path / "found" / "model.safetensors"), load_file(plain / "model.safetensors")
    assert output.keys() == original.keys()
    assert torch.equal(output["lm_head.weight"], original["lm_head.weight"])


def test_they_are_evaluated_as_what_they_stand_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for model in written("fp8-blocks", folder / "llama", tmp_path):
        command = ["evaluate", str(model), "--text", str(folder / "text.txt"), "--samples", "4", "--json"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", DROPPED)
            assert main([*command, "--sequence-length", "16"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_packed_output_has_the_compressions_header_alone(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    scaled, _ = written("fp8-blocks", folder / "llama", tmp_path)
    command = [
        "--calibration",
        str(folder / "text.txt"),
        "--output",
        str(tmp_path / "out"),
        *WINDOWS,
        "--method",
        "rtn",
    ]
    with pytest.warns(UserWarning, match=DROPPED):
        assert main(["compress", str(scaled), *command]) == 0
    header = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert header["quant_method"] == "compressed-tensors" and header["format"] == "pack-quantized"
    assert "weight_block_size" not in header
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        not [name for name in stored if name.endswith("_scale_inv")]
        and stored["lm_head.weight"].dtype == torch.bfloat16
    )


def refused(model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    options = ["--calibration", str(folder / "text.txt"), "--output", str(tmp_path / "out"), *SMALL]
    assert main(["compress", str(model), *options]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def changed_config(model: Path, **changes: Any) -> None:
    config = {**json.loads((model / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (model / "config.json").write_text(json.dumps(kept))


def test_codes_without_a_header_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled, _ = written("fp8-tensor", folder / "llama", tmp_path)
    changed_config(scaled, quantization_config=None)
    error = refused(scaled, folder, tmp_path, capsys)
    assert "model.layers.0.mlp.down_proj.weight and 13 more are stored in 8 bits or fewer (F8_E4M3)" in error


def test_a_scale_that_is_missing_is_told_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain = written("fp8-tensor", folder / "llama", tmp_path)
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(FP8)}, plain / "model.safetensors", {"format": "pt"})
    changed_config(plain, quantization_config=KINDS["fp8-tensor"].header)
    error = refused(plain, folder, tmp_path, capsys)
    assert f"{name} is stored as F8_E4M3 without its scale, {name}_scale_inv or {name}_scale" in error


def test_other_quantizations_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled, _ = written("fp8-tensor", folder / "llama", tmp_path)
    changed_config(scaled, quantization_config={"quant_method": "awq", "bits": 4})
    assert "quantized already, by awq: compress the original" in refused(scaled, folder, tmp_path, capsys)
