"""Checkpoints for mlx-lm: what is stored, and what MLX makes of it where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import GATED, _make, token_ids

from opt8bit import ptq
from opt8bit.ptq.export.mlx import BITS
from opt8bit.ptq.inspect import inspect, unpacked_weight
from opt8bit.quant.packing import unpack
from opt8bit.quant.weight import QuantizedWeight

WIDE: dict[str, Any] = {**GATED, "hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
LAYER = "model.layers.1.mlp.down_proj"


def result(bits: int = 4, group_size: int = 32, dtype: torch.dtype = torch.float32, **options: Any) -> ptq.Result:
    model: Any = _make("Llama", **WIDE)()
    rotary = model.model.rotary_emb.inv_freq
    model.to(dtype).model.rotary_emb.inv_freq = rotary
    return ptq.compress(model, token_ids(), bits=bits, group_size=group_size, runtime="mlx", **options)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_scale_times_code_plus_bias_is_the_weight(
    bits: int, group_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = result(bits, group_size, dtype, method="rtn")
    tensors = stored(ptq.export(made, tmp_path / "out"))
    for name, change in made.changes.items():
        assert isinstance(change, QuantizedWeight)
        layer = name.removesuffix(".weight")
        words, scale, bias = (tensors[f"{layer}.{part}"] for part in ("weight", "scales", "biases"))
        assert words.dtype == torch.uint32 and scale.dtype == bias.dtype == dtype
        codes = unpack(words.view(torch.int32), bits, 128).unflatten(1, (-1, group_size)).double()
        values = scale.double()[..., None] * codes + bias.double()[..., None]
        expected = change.dequantize()  # rounds once, as the sum does that was exact so far
        assert torch.equal(values.flatten(1).to(expected.dtype), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert {"bits": bits, "group_size": group_size, "mode": "affine"}.items() <= config["quantization"].items()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    made = result(3, overrides={"*.down_proj": {"bits": 5, "group_size": 64}, "*.0.*.up_proj": None})
    folder = ptq.export(made, tmp_path / "out")
    assert ptq.verify(folder).is_right
    contents = inspect(folder)
    assert {layer.bits for layer in contents.layers.values()} == {3, 5} and len(contents.layers) == 13
    config = json.loads((folder / "config.json").read_text())["quantization"]
    assert (config["bits"], config["group_size"]) == (3, 32)
    assert config[LAYER] == {"group_size": 64, "bits": 5}
    change = made.changes[f"{LAYER}.weight"]
    assert isinstance(change, QuantizedWeight)
    found = unpacked_weight(folder, LAYER)
    values = (found.codes - found.zero_point[:, found.group]) * found.scale[:, found.group]
    assert torch.equal(values, change.dequantize())


def test_a_changed_code_is_noticed(tmp_path: Path) -> None:
    folder = ptq.export(result(), tmp_path / "out")
    tensors = stored(folder)
    tensors[f"{LAYER}.weight"] = (tensors[f"{LAYER}.weight"].view(torch.int32) ^ 0x77777777).view(torch.uint32)
    save_file(tensors, folder / "model.safetensors")
    assert not ptq.verify(folder).is_right


def test_grids_of_others_are_refused(tmp_path: Path) -> None:
    folder = ptq.export(result(), tmp_path / "out")
    tensors = stored(folder)
    tensors[f"{LAYER}.biases"] *= 1.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{LAYER} has biases that are not -2\^\(bits-1\) times the scales"):
        inspect(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", BITS)
def test_mlx_computes_with_the_same_weights(bits: int, tmp_path: Path) -> None:
    mx: Any = pytest.importorskip("mlx.core")
    made = result(bits, method="rtn")
    weights = mx.load(str(ptq.export(made, tmp_path / "out") / "model.safetensors"))
    parts = [weights[f"{LAYER}.{part}"] for part in ("weight", "scales", "biases")]
    change = made.changes[f"{LAYER}.weight"]
    assert isinstance(change, QuantizedWeight)
    found = torch.tensor(mx.dequantize(*parts, group_size=32, bits=bits).tolist())
    largest = float(torch.tensor(parts[2].tolist()).abs().max())  # of what scale * code is added to, and rounded
    torch.testing.assert_close(found, change.dequantize(), rtol=0, atol=2**-22 * largest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("correct", ["none", "sequential"])
def test_mlx_lm_runs_it(correct: str, tmp_path: Path) -> None:
    mx: Any = pytest.importorskip("mlx.core")
    utils: Any = pytest.importorskip("mlx_lm.utils")
    made = result(3, bias_correction=correct, overrides={"*.down_proj": {"bits": 4}, "*.0.*.up_proj": None})
    model, _ = utils.load_model(ptq.export(made, tmp_path / "out"))
    ids = token_ids(2)
    found = torch.tensor(model(mx.array(ids.tolist())).tolist())
    with torch.no_grad():
        expected = made.compressed_model()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
