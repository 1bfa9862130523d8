"""Weights in fp8 and int8 are what the libraries that store them take them for, and all else is refused by name."""

import doctest
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scaled_checkpoints import FP8, KINDS, blocks
from torch import Tensor

from opt8bit.ptq.model import scaled as module
from opt8bit.ptq.model.quantization_header import dtype_of, header_of, scheme_of, without_header
from opt8bit.ptq.model.scaled import Scaled, refuse_narrow

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NAME = "model.layers.0.self_attn.k_proj"
FINE = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def weight(*shape: int) -> Tensor:
    """Of magnitudes that differ by column, by row, and by sign, so that each scale and zero point counts."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.exp(torch.randn(shape[-2], 1, generator=generator) + torch.randn(shape[-1], generator=generator))
    return ((torch.randn(shape, generator=generator) + 0.3) * magnitudes).to(torch.bfloat16)


def test_the_example_is_true() -> None:
    assert doctest.testmod(module) == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_librarys(kind: str) -> None:
    """40 rows are no multiple of the blocks' 24."""
    stored = KINDS[kind].store(weight(40, 64))
    tensors = {f"{NAME}.weight{end}": tensor for end, tensor in stored.tensors.items()}
    others = [f"{NAME}.{end}" for end in KINDS[kind].others]
    plain = ["model.embed_tokens.weight", "model.norm.weight", f"{NAME}.bias", "lm_head.weight"]
    scaled = Scaled(KINDS[kind].header, [*tensors, *others, *plain])
    assert scaled.names == {f"{NAME}.weight", *plain}
    assert set(scaled.parts(f"{NAME}.weight")) == set(tensors)
    assert all(scaled.parts(name) == (name,) for name in plain)
    found = scaled.weight(f"{NAME}.weight", tensors)
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    assert torch.equal(found, stored.values)
    scaled.check({name: tensor.dtype for name, tensor in tensors.items()})
    assert (found.float() - weight(40, 64).float()).abs().mean() < 0.1 * weight(40, 64).float().abs().mean()


@pytest.mark.parametrize("kind", ["int-asymmetric", "int-asymmetric-rows"])
def test_zero_points_are_some(kind: str) -> None:
    stored = KINDS[kind].store(weight(40, 64))
    assert stored.tensors["_zero_point"].unique().numel() > 2


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (5, 257), (129, 3)])
def test_last_blocks_are_short(shape: tuple[int, int]) -> None:
    stored = blocks(weight(*shape), 128, 128, "_scale_inv")
    tensors = {f"a.weight{end}": tensor for end, tensor in stored.tensors.items()}
    found = Scaled(FINE, tensors).weight("a.weight", tensors)
    assert torch.equal(found, stored.values)
    pytest.importorskip("compressed_tensors", minversion="0.17")
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    assert torch.equal(found, FP8BlockDequantizer().process(dict(tensors))["a.weight"])


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_blocks_are_those_of_transformers(scale_fmt: str) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Dequantize"):
        pytest.skip("transformers dequantizes on GPUs only")
    from transformers import FineGrainedFP8Config

    config = FineGrainedFP8Config(weight_block_size=(16, 8), scale_fmt=scale_fmt)
    quantizer: Any = SimpleNamespace(quantization_config=config)
    tensors = fp8.Fp8Quantize(quantizer).convert({"a.weight": weight(64, 32).float()})
    pair = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    expected = fp8.Fp8Dequantize(quantizer)._dequantize_one(*pair.values(), output_dtype=torch.bfloat16)
    found = Scaled(config.to_dict(), tensors).weight("a.weight", tensors)
    assert torch.equal(found, expected)
    if scale_fmt == "ue8m0":  # some store the exponents' bytes
        tensors["a.weight_scale_inv"] = tensors["a.weight_scale_inv"].view(torch.uint8)
        assert torch.equal(Scaled(config.to_dict(), tensors).weight("a.weight", tensors), expected)


def test_stacks_of_experts_have_scales_of_their_own() -> None:
    experts = [blocks(weight(48, 40) * (expert + 1), 24, 16, "_scale_inv") for expert in range(3)]
    tensors = {f"up{end}": torch.stack([stored.tensors[end] for stored in experts]) for end in ("", "_scale_inv")}
    header = KINDS["fp8-blocks"].header
    values = torch.stack([stored.values for stored in experts])
    assert torch.equal(Scaled(header, tensors).weight("up", tensors), values)
    tensors["up_scale_inv"] = torch.tensor([1.0, 2.0, 4.0])
    found = Scaled(header, tensors, torch.float32).weight("up", tensors)
    assert torch.equal(found, tensors["up"].float() * tensors["up_scale_inv"][:, None, None])


def test_blocks_of_modelopt_have_four_dimensions() -> None:
    stored = blocks(weight(256, 384), 128, 128, "_scale", (2, 1, 3, 1))
    tensors = {f"a.weight{end}": tensor for end, tensor in stored.tensors.items()}
    header = {"quantization": {"quant_algo": "fp8_pb_wo"}}
    scaled = Scaled(header, tensors)
    assert torch.equal(scaled.weight("a.weight", tensors), stored.values)
    assert scaled.notice() is None


def test_what_is_not_scaled_stays() -> None:
    names = {"a.weight": torch.ones(2, 2), "norm.weight": torch.ones(2, dtype=torch.float16), "bias": torch.ones(2)}
    scaled = Scaled(FINE, names)
    for name, tensor in names.items():
        assert scaled.weight(name, names) is tensor


def test_products_are_rounded_once() -> None:
    """To the nearest: 1.00390625 is between two of bfloat16, and 1.00390625 · 1.001 above their middle."""
    codes, scale = torch.ones(1, 1).to(FP8), torch.tensor([[1.00390625 * 1.001]])
    tensors = {"a.weight": codes, "a.weight_scale_inv": scale}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(Scaled(FINE, tensors, dtype).weight("a.weight", tensors), scale.to(dtype))


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """Those of a weight of 200 × 300 in blocks."""
    stored = blocks(weight(200, 300), 128, 128, "_scale_inv").tensors
    tensors = {"weight": stored[""], "weight_scale_inv": stored["_scale_inv"], **changes}
    return {f"a.{name}": tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(weight_scale_inv=None), r"a\.weight is stored as torch.float8_e4m3fn without its scale, a\.weight_s"),
        (
            changed(weight_scale_inv=torch.ones(3, 2)),
            r"a\.weight_scale_inv of shape \(3, 2\) does not fit \(200, 300\)",
        ),
        (changed(weight_scale_inv=torch.ones(1, 200)), r"a\.weight_scale_inv of shape \(1, 200\) does not fit"),
        (changed(weight_scale_inv=torch.ones(300)), r"a\.weight_scale_inv of shape \(300,\) does not fit"),
        (changed(weight_scale_inv=torch.full((2, 3), torch.nan)), r"a\.weight_scale_inv is not finite"),
        (changed(weight_scale_inv=torch.full((2, 3), torch.inf)), r"a\.weight_scale_inv is not finite"),
        (
            changed(weight_scale_inv=torch.ones(2, 3, dtype=torch.uint8)),
            r"a\.weight_scale_inv is stored as torch.uint8",
        ),
        (changed(weight=torch.ones(200, 300)), r"a\.weight has a scale, and is stored as torch.float32"),
        (changed(weight=torch.ones(200, 300, dtype=torch.int8)), r"a\.weight has a scale, and is stored as torch.int8"),
        (changed(weight=torch.full((200, 300), torch.nan).to(FP8)), r"a\.weight has values that are not finite"),
        (changed(weight_scale_inv=torch.full((2, 3), 1e38)), r"a\.weight has values that are not finite"),
        (changed(weight_zero_point=torch.ones(200, 1)), r"a\.weight_zero_point has another shape than a\.weight_scale"),
    ],
)
def test_damage_is_named(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scaled(FINE, tensors).weight("a.weight", tensors)


def test_a_part_that_is_not_given_is_named() -> None:
    tensors = changed()
    scaled = Scaled(FINE, tensors)
    with pytest.raises(ValueError, match=r"a\.weight_scale_inv is missing"):
        scaled.weight("a.weight", {"a.weight": tensors["a.weight"]})


def test_two_scales_of_one_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.weight has two scales, a\.weight_scale_inv and a\.weight_scale"):
        Scaled(FINE, changed(weight_scale=torch.ones(())))


def test_a_scale_that_fits_in_two_ways_is_refused() -> None:
    weights = [{**KINDS["int-groups"].header["config_groups"]["group_0"]} for _ in range(2)]
    weights[1] = {**weights[1], "weights": {**weights[1]["weights"], "group_size": 24}}
    header = {**KINDS["int-groups"].header, "config_groups": {"a": weights[0], "b": weights[1]}}
    tensors = {"a.weight": torch.ones(8, 20, dtype=torch.int8), "a.weight_scale": torch.ones(8, 2)}
    Scaled({**header, "config_groups": {"a": weights[0]}}, tensors).weight("a.weight", tensors)
    tensors["a.weight"] = torch.ones(8, 48, dtype=torch.int8)  # two groups of 24, three of 16
    Scaled(header, tensors).weight("a.weight", tensors)
    weights[1]["weights"]["group_size"] = 30
    tensors["a.weight"] = torch.ones(8, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"a\.weight_scale of shape \(8, 2\) fits .* in several ways"):
        Scaled(header, tensors).weight("a.weight", tensors)


def test_groups_wider_than_a_weight_are_its_rows() -> None:
    tensors = {"a.weight": torch.ones(8, 12, dtype=torch.int8), "a.weight_scale": torch.arange(1.0, 9.0)[:, None]}
    found = Scaled(KINDS["int-groups"].header, tensors, torch.float32).weight("a.weight", tensors)
    assert torch.equal(found, tensors["a.weight_scale"].expand(8, 12))


def test_several_groups_are_told_apart_by_their_tensors() -> None:
    """Rows in fp8 and groups in int8, each in its own format."""
    kinds = {"a": KINDS["float-rows"], "b": KINDS["int-groups"]}
    groups = {
        name: {**kind.header["config_groups"]["group_0"], "format": kind.header["format"]}
        for name, kind in kinds.items()
    }
    stored = {name: kind.store(weight(40, 64)) for name, kind in kinds.items()}
    tensors = {f"{name}.weight{end}": tensor for name in stored for end, tensor in stored[name].tensors.items()}
    scaled = Scaled(
        {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}, tensors
    )
    for name, expected in stored.items():
        assert torch.equal(scaled.weight(f"{name}.weight", tensors), expected.values)


def compressed(format: str = "float-quantized", **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"g": group}, **changes}


INT4 = {"num_bits": 4, "type": "int", "group_size": 32}


@pytest.mark.parametrize(
    ("header", "by"),
    [
        ({"quant_method": "gptq", "bits": 8}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "torchao"}, "torchao"),
        ({}, "None"),
        ({"quant_method": "fp8", "expert_dtype": "fp4", "weight_block_size": [128, 128]}, "fp8 with experts in fp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\)"),
        ({"quantization": {"quant_algo": "W4A8_AWQ"}}, r"modelopt \(W4A8_AWQ\)"),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, "modelopt_fp4"),
        (compressed("pack-quantized"), r"compressed-tensors \(pack-quantized, 8 bits\)"),
        (compressed("mxfp8-quantized"), r"compressed-tensors \(mxfp8-quantized, 8 bits\)"),
        (compressed("int-quantized", config_groups={"g": {"weights": INT4}}), r"\(int-quantized, 4 bits\)"),
        (compressed(config_groups={"W4A16": ["Linear"]}), "its header does not say how W4A16 is stored"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed(transform_config={"config_groups": {"v": {"type": "hadamard"}}}), "with transforms"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4"}}}, "quark, with weights that"),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": [{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]}},
            "quark, with weights that",
        ),
        (
            {"quant_method": "quark", "global_quant_config": {}, "algo_config": [{"name": "rotation"}]},
            "quark with rotations",
        ),
    ],
)
def test_what_is_more_than_scaled_is_refused(header: dict[str, Any], by: str) -> None:
    with pytest.raises(ValueError, match=f"quantized already, by .*{by}.*: compress the original"):
        Scaled(header, ["a.weight", "a.weight_scale"])


@pytest.mark.parametrize("end", ["weight_packed", "weight_g_idx", "pre_quant_scale", "weight_scale_2"])
def test_tensors_that_are_more_than_scales_are_named(end: str) -> None:
    with pytest.raises(ValueError, match=rf"in more than scales \(a\.{end}\): compress the original"):
        Scaled(compressed(), ["a.weight", "a.weight_scale", f"a.{end}"])


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [128.5, 128], [-1, 128], 128])
def test_blocks_that_are_none_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="the header has blocks of"):
        scheme_of({"quant_method": "fp8", "weight_block_size": size})


def test_older_headers_are_read() -> None:
    text = {**compressed(), "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}}}
    text["config_groups"]["g"]["weights"]["block_structure"] = "24x16"
    del text["quant_method"]
    assert scheme_of({"quantization_config": text}).blocks == ((24, 16),)
    assert scheme_of({"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": "FP8"}).cache


def test_headers_are_found_and_removed_wherever_they_are() -> None:
    header, hf = KINDS["modelopt"].header, KINDS["modelopt-file"].header
    configs: list[dict[str, Any]] = [
        {"model_type": "llama", "quantization_config": header},
        {"model_type": "llama", "compression_config": header},
        {"model_type": "llava", "text_config": {"model_type": "llama", "quantization_config": header}},
    ]
    for config in configs:
        before = json.dumps(config)
        assert header_of(config, hf) is header
        plain = without_header(config)
        assert "quantiz" not in json.dumps(plain) and "compression" not in json.dumps(plain)
        assert header_of(plain) is None and header_of(plain, hf) is hf
        assert plain["model_type"] == config["model_type"] and json.dumps(config) == before


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"text_config": {"torch_dtype": "float16"}}, torch.float16),
        ({"torch_dtype": None}, torch.bfloat16),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
        ({"dtype": "auto", "torch_dtype": torch.float16}, torch.float16),
        ({}, torch.bfloat16),
    ],
)
def test_dtypes_are_the_configs(config: dict[str, Any], dtype: torch.dtype) -> None:
    assert dtype_of(config) == dtype


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fp8-blocks", "the quantization of activations is dropped"),
        ("modelopt", "the quantization of activations and of keys and values is dropped"),
        ("quark", "of activations and of keys and values is dropped"),
    ],
)
def test_what_is_dropped_is_said(kind: str, words: str) -> None:
    notice = Scaled(KINDS[kind].header, ["a.weight", "a.weight_scale"], torch.float16).notice()
    assert notice is not None and words in notice and "dequantized to float16" in notice


def test_weights_only_drop_nothing() -> None:
    assert Scaled(compressed(), ["a.weight", "a.weight_scale"]).notice() is None


def test_what_nothing_is_quantized_of_drops_nothing() -> None:
    assert Scaled(FINE, ["a.weight"]).notice() is None


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "F4", torch.float8_e5m2, torch.uint8, "int8"])
def test_codes_without_a_header_are_refused(dtype: str | torch.dtype) -> None:
    dtypes = {"b.weight": dtype, "a.weight": dtype, "norm.weight": "BF16", "c.weight": torch.float16}
    with pytest.raises(ValueError, match=r"^a\.weight and 1 more are stored in 8 bits .* or compress the orig"):
        refuse_narrow(dtypes)
    with pytest.raises(ValueError, match=r"^a\.weight is stored in 8 bits or fewer \(.*\), and neither config.json"):
        refuse_narrow({"a.weight": dtype})


def test_wide_tensors_and_masks_are_not_codes() -> None:
    refuse_narrow({"a": "F16", "b": "BF16", "c": "F32", "d": "BOOL", "e": torch.bool, "f": torch.float64, "g": "I64"})


def test_dtypes_are_checked_before_anything_is_read() -> None:
    scaled = Scaled(FINE, ["a.weight", "a.weight_scale_inv", "b.weight", "b.input_scale"])
    scaled.check({"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32", "b.weight": "BF16", "b.input_scale": "F32"})
    with pytest.raises(ValueError, match=r"b\.weight is stored as F8_E4M3 without its scale, b\.weight_scale_inv or"):
        scaled.check({"b.weight": "F8_E4M3"})
    with pytest.raises(ValueError, match=r"a\.weight has a scale, and is stored as I8"):
        scaled.check({"a.weight": "I8"})
