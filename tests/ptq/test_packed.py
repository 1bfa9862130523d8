"""Packed weights of other tools are read as what they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import KINDS, awq, compressed_tensors, ct_header, gptq, group_header, rounded, write_packed
from torch import Tensor
from toys import MODELS, shaken

from opt8bit import ptq
from opt8bit.ptq.model.checkpoint_files import CheckpointFiles
from opt8bit.ptq.model.packed.awq import AWQLayout
from opt8bit.ptq.model.packed.checkpoint import AUTO_ROUND, Packed, packed_checkpoint
from opt8bit.ptq.model.packed.compressed_tensors import CompressedTensorsLayout
from opt8bit.ptq.model.packed.gptq import GPTQLayout
from opt8bit.ptq.model.packed.layout import Layout

WEIGHT = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


def ct(*groups: dict[str, Any]) -> CompressedTensorsLayout:
    return CompressedTensorsLayout.of(ct_header(*groups))


def of_bits(bits: int, symmetric: bool = True) -> CompressedTensorsLayout:
    return ct(group_header(bits, symmetric))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, order: bool) -> None:
    weight = rounded(torch.cat([WEIGHT, WEIGHT[:8]]), bits, levels=4, order=order)
    for shift in (0, 1):
        assert torch.equal(GPTQLayout(shift).weight("a", gptq(weight, bits, shift=shift)), weight.values)
        assert order or torch.equal(
            GPTQLayout(shift).weight("a", gptq(weight, bits, shift=shift, g_idx=False)), weight.values
        )


def test_awq() -> None:
    weight = rounded(WEIGHT)
    assert torch.equal(AWQLayout().weight("a", awq(weight)), weight.values)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors(bits: int, symmetric: bool, order: bool) -> None:
    weight = rounded(WEIGHT, bits, symmetric=symmetric, order=order)
    for each in (None, 32 // bits):
        parts = compressed_tensors(weight, bits, each=each)
        assert torch.equal(of_bits(bits, symmetric).weight("a", parts), weight.values)
    parts = compressed_tensors(weight, bits, loose=True)
    assert torch.equal(of_bits(bits, symmetric).weight("a", parts), weight.values)


def test_scales_may_be_negative() -> None:
    weight = rounded(WEIGHT, symmetric=True)
    negative = torch.rand(weight.scale.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = weight._replace(scale=torch.where(negative, -weight.scale, weight.scale))
    assert torch.equal(of_bits(4).weight("a", compressed_tensors(weight, 4)), weight.values)
    assert torch.equal(AWQLayout().weight("a", awq(weight)), weight.values)
    for shift in (0, 1):
        assert torch.equal(GPTQLayout(shift).weight("a", gptq(weight, 4, shift=shift)), weight.values)


def test_rows_and_tensors_have_one_scale() -> None:
    weight = rounded(WEIGHT, symmetric=True)
    parts = compressed_tensors(weight, 4)
    codes = (weight.codes - 8).float()
    rows = ct(group_header(4, True) | {"weights": {"num_bits": 4, "group_size": None}})
    parts["weight_scale"] = torch.arange(1, 25)[:, None] / 4
    assert torch.equal(rows.weight("a", parts), codes * parts["weight_scale"])
    parts["weight_scale"] = torch.tensor([0.5])
    assert torch.equal(rows.weight("a", parts), codes / 2)


def test_the_header_says_which_layer_has_which_width() -> None:
    layout = ct(group_header(8, True, ["re:.*down_proj$", "x.y"]), group_header(4, True))
    wide, narrow = rounded(WEIGHT, 8, symmetric=True), rounded(WEIGHT, 4, symmetric=True)
    for name in ("model.layers.0.mlp.down_proj", "x.y"):
        assert torch.equal(layout.weight(name, compressed_tensors(wide, 8)), wide.values)
    assert torch.equal(layout.weight("x.up_proj", compressed_tensors(narrow, 4)), narrow.values)
    with pytest.raises(ValueError, match="2 groups of the header name x, one was expected"):
        ct(group_header(8, True), group_header(4, True)).weight("x", compressed_tensors(narrow, 4))


@pytest.mark.parametrize("name", AUTO_ROUND)
def test_auto_round_has_the_layouts_of_others(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        f'{{"quantization_config": {{"quant_method": "auto-round", "packing_format": "{name}"}}}}'
    )
    weight = rounded(torch.cat([WEIGHT, WEIGHT[:8]]))
    parts = awq(weight) if name.endswith("awq") else gptq(weight, 4, shift=int(name.endswith(":auto_gptq")))
    packed = packed_checkpoint(tmp_path, [f"a.{part}" for part in parts])
    assert packed is not None and packed.dtype == torch.bfloat16
    tensors = {f"a.{part}": value for part, value in parts.items()}
    assert torch.equal(packed.weight("a.weight", tensors), weight.values.bfloat16())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "the weights are quantized by bitsandbytes: only the layouts of"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "must be one of gptq, gptq_v2, got 'marlin'"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "must be one of gptq, gptq_v2, got 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "of version 'gemm' and of 4 bits, got version 'gemv', 4 bits"),
        ({"quant_method": "awq", "bits": 8}, "got version 'gemm', 8 bits"),
        ({"quant_method": "awq", "backend": "llm-awq"}, "by llm-awq"),
        ({"quant_method": "auto-round", "packing_format": "itrex"}, "must be one of auto_round, .*'itrex'"),
        (
            {**ct_header({"weights": {"type": "float"}}), "format": "nvfp4-pack-quantized"},
            "must be pack-quantized and integers, got nvfp4-pack-quantized, of type float",
        ),
        (
            {**ct_header(group_header(4, True)), "transform_config": {"config_groups": {"u": {}}}},
            "with transforms",
        ),
    ],
)
def test_other_layouts_are_refused(header: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": header}))
    with pytest.raises(ValueError, match=message):
        packed_checkpoint(tmp_path, ["a.weight_packed", "a.qweight"])


def without(parts: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in parts.items() if key != name}


GPTQ_PARTS, AWQ_PARTS = gptq(rounded(torch.cat([WEIGHT, WEIGHT[:8]])), 4), awq(rounded(WEIGHT))
CT_PARTS = compressed_tensors(rounded(WEIGHT, symmetric=True), 4)


@pytest.mark.parametrize(
    ("layout", "parts", "message"),
    [
        (GPTQLayout(1), without(GPTQ_PARTS, "scales"), "a cannot be unpacked: scales is missing"),
        (GPTQLayout(1), GPTQ_PARTS | {"g_idx": torch.full((64,), 9)}, "the groups of 64 inputs must be from 0 to 3"),
        (GPTQLayout(1), GPTQ_PARTS | {"qzeros": GPTQ_PARTS["qzeros"][:, :3]}, "does not fit 3 bits"),
        (GPTQLayout(1), GPTQ_PARTS | {"scales": GPTQ_PARTS["scales"] / 0}, "values that are not finite"),
        (AWQLayout(), AWQ_PARTS | {"scales": AWQ_PARTS["scales"][:, :8]}, "do not fit 24 outputs"),
        (of_bits(4), without(CT_PARTS, "weight_shape"), "weight_shape is missing"),
        (of_bits(4), CT_PARTS | {"weight_packed": CT_PARTS["weight_packed"][:, :3]}, "words must be int32"),
        (of_bits(4), CT_PARTS | {"weight_packed": CT_PARTS["weight_packed"][:3]}, "does not fit a weight of 24 × 64"),
    ],
)
def test_damaged_weights_are_refused_by_their_names(layout: Layout, parts: dict[str, Tensor], message: str) -> None:
    packed = Packed(layout, [f"a.{name}" for name in parts], torch.float32)
    with pytest.raises(ValueError, match=message):
        packed.weight("a.weight", {f"a.{name}": value for name, value in parts.items()})


def test_a_weight_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.weight is stored both as it is and packed"):
        Packed(AWQLayout(), ["a.qweight", "a.weight"], torch.float16)
    with pytest.raises(ValueError, match="the checkpoint has no qweight"):
        Packed(AWQLayout(), ["a.weight"], torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_as_a_model(kind: str, tmp_path: Path) -> None:
    shaken(MODELS["llama"]()).save_pretrained(tmp_path / "base")
    values = write_packed(tmp_path / "base", tmp_path / "packed", KINDS[kind])
    with pytest.raises(ValueError, match="quantized already"):
        CheckpointFiles(tmp_path / "packed")
    source = ptq.Checkpoint(tmp_path / "packed", unpack=True)
    assert not source.without_place
    found = source.copy().state_dict()
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(found[name], value), name


@pytest.mark.filterwarnings("ignore:not every server runs:UserWarning")
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_what_is_exported_here_is_read(format: str, tmp_path: Path) -> None:
    model: Any = shaken(MODELS["llama"]())
    ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(0))
    result = ptq.compress(model, ids, method="rtn", bits=4, group_size=16, checkpoint_format=format)
    ptq.export(result, tmp_path / "out", format=format)
    found, expected = ptq.Checkpoint(tmp_path / "out", unpack=True).copy(), result.compressed_model()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
