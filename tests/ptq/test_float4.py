"""4-bit floats: scales as the format stores them, the bytes of compressed-tensors, and what loads them."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.inspect import inspect
from opt8bit.ptq.model.servers import FUSED
from opt8bit.quant.float4 import MAGNITUDES, MXFP4Grid, NVFP4Grid, pack_e2m1, unpack_e2m1
from opt8bit.quant.weight import QuantizedWeight

GRIDS = {"nvfp4": NVFP4Grid(), "mxfp4": MXFP4Grid()}
SIZES = {"nvfp4": 16, "mxfp4": 32}
E2M1 = torch.tensor([sign * magnitude for sign in (1, -1) for magnitude in MAGNITUDES], dtype=torch.float64)
OPTIONS: list[dict[str, Any]] = [{}, {"method": "rtn"}, {"act_order": False}, {"bias_correction": "joint"}]
every_grid = pytest.mark.parametrize("grid", GRIDS)


@functools.cache
def compressed(grid: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> ptq.Result:
    about = {"checkpoint_format": "compressed-tensors", "runtime": "transformers", **options}
    return ptq.compress(MODELS["llama"]().to(dtype), token_ids(8, 16), grid=grid, **about)


def stored_scales(grid: str) -> Tensor:
    """Every scale that a format stores, for NVFP4 under the global scale 1."""
    if grid == "mxfp4":
        return torch.exp2(torch.arange(-126, 128, dtype=torch.float64))
    values = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return values[values.isfinite()]


def blocks(grid: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, SIZES[grid], generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-6, 7, (9, 5, 1), generator=generator))
    return x, torch.rand(5, SIZES[grid], generator=generator, dtype=torch.float64)


@every_grid
def test_the_search_finds_the_best_of_all_scales_that_are_stored(grid: str) -> None:
    x, importance = blocks(grid)
    found = GRIDS[grid].fit(x, importance)
    unit = found.unit[..., None] if grid == "nvfp4" else 1.0
    every = stored_scales(grid) * unit  # (..., 1, scales)
    values = x[..., None] / every
    nearest = E2M1[(values[..., None] - E2M1).abs().argmin(-1)] * every
    errors = ((nearest - x[..., None]).square() * importance[..., None]).sum(-2)
    own = ((GRIDS[grid].nearest(x, found) - x).square() * importance).sum(-1)
    torch.testing.assert_close(own, errors.amin(-1))


@every_grid
def test_scales_are_those_that_are_stored(grid: str) -> None:
    x, _ = blocks(grid)
    for name in ("minmax", "mse"):
        params = type(GRIDS[grid])(range=name).fit(x)  # type: ignore[call-arg]
        ratio = params.scale / (params.unit if grid == "nvfp4" else 1.0)
        assert torch.isin(ratio, stored_scales(grid)).all()
    every = (stored_scales(grid) * (params.unit if grid == "nvfp4" else 1.0)).expand(*params.scale.shape[:-1], -1)
    for factor in (1.03, 1.4, 1.6):
        nearest = (params.scale * factor - every).abs().argmin(-1, keepdim=True)
        assert torch.equal(GRIDS[grid].storable(params.scale * factor, params), every.gather(-1, nearest))


def test_groups_of_zeros_do_not_move_the_global_scale() -> None:
    x, _ = blocks("nvfp4")
    with_zeros = x.clone()
    with_zeros[0] = 0
    with_zeros[1, 2] = 0
    grid = NVFP4Grid()
    assert torch.equal(grid.fit(with_zeros).unit, grid.fit(x).unit)
    assert not grid.nearest(with_zeros, grid.fit(with_zeros))[0].any()
    assert grid.fit(torch.zeros(2, 16)).scale.isfinite().all()


def test_packed_codes_come_back() -> None:
    codes = torch.arange(15, dtype=torch.uint8).repeat(2, 2)
    assert torch.equal(unpack_e2m1(pack_e2m1(codes)), codes)
    assert pack_e2m1(torch.tensor([[7, 14, 6, 0]], dtype=torch.uint8)).tolist() == [[0x70, 0xF9]]


def weights(result: ptq.Result) -> Iterator[tuple[str, QuantizedWeight]]:
    for name, change in result.changes.items():
        if isinstance(change, QuantizedWeight):
            yield name.removesuffix(".weight"), change


@every_grid
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bytes_are_those_of_the_package(grid: str, options: dict[str, Any], tmp_path: Path) -> None:
    compressors: Any = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    result = compressed(grid, **options)
    folder = ptq.export(result, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    header = json.loads((folder / "config.json").read_text())["quantization_config"]
    args = QuantizationArgs(**header["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    package = compressors.BaseCompressor.get_value_from_registry(header["format"])
    assert header["format"] == f"{grid}-pack-quantized"
    for layer, weight in weights(result):
        parts = {name.rpartition(".")[2]: t for name, t in stored.items() if name.startswith(f"{layer}.weight")}
        read = package.decompress(parts, scheme)["weight"]
        assert torch.equal(read.float(), weight.dequantize())  # bfloat16 holds each weight
        scale = weight.parts[0].params.scale
        given = {"weight": weight.dequantize(), "weight_scale": scale}
        if grid == "nvfp4":
            given |= {"weight_global_scale": parts["weight_global_scale"]}
            given["weight_scale"] = scale * parts["weight_global_scale"]
        again = package.compress(given, scheme)
        for name, tensor in parts.items():
            assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers_that_servers_put_together_share_the_global_scale(options: dict[str, Any]) -> None:
    result = compressed("nvfp4", **options)
    units = {name: weight.parts[0].params.unit.unique() for name, weight in weights(result)}
    assert all(unit.numel() == 1 for unit in units.values())
    for name, unit in units.items():
        parent, _, own = name.rpartition(".")
        others = next((names for names in FUSED if own in names), (own,))
        assert all(torch.equal(units[f"{parent}.{other}"], unit) for other in others)
    assert len({float(unit) for unit in units.values()}) > 1


@every_grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_transformers_computes_the_compressed_models_logits(grid: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import transformers

    result = compressed(grid, dtype)
    folder = ptq.export(result, tmp_path / "out")
    loaded, made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), result.compressed_model()
    for name, weight in made.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name
    if dtype == torch.float32:  # the toy's rotary frequencies are of the dtype that it was converted to
        ids = token_ids(2, 16)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits.log_softmax(-1), made(ids).logits.log_softmax(-1))
    assert ptq.verify(folder).is_right
    assert {(layer.grid, layer.bits) for layer in inspect(folder).layers.values()} == {(grid, 4)}


@every_grid
def test_each_method_is_better_than_the_one_before(grid: str) -> None:
    errors = [
        sum(row.error_rounded for row in compressed(grid, torch.float32, error_propagation=0.0, **options).report)
        for options in ({"method": "rtn"}, {"method": "gptq", "polish": False}, {})
    ]
    assert errors[0] > errors[1] > errors[2]


@every_grid
def test_stored_bits(grid: str) -> None:
    row = compressed(grid).report[0]
    assert row.bits_per_weight == 4 + 8 / SIZES[grid] + (32 / (32 * 32) if grid == "nvfp4" else 0)


def test_scales_are_learned_as_they_are_stored(tmp_path: Path) -> None:
    result = compressed("nvfp4", reconstruction="scales")
    for _, weight in weights(result):
        ratio = weight.parts[0].params.scale / weight.parts[0].params.unit
        assert torch.isin(ratio.double(), stored_scales("nvfp4")).all()
    assert ptq.verify(ptq.export(result, tmp_path / "out")).is_right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 32}, r"q_proj: nvfp4 has groups of 16 weights, got 32"),
        ({"overrides": {"*.down_proj": {"grid": "mxfp4"}}}, r"down_proj: .* one grid of 4-bit floats for all layers"),
        ({"overrides": {"*.down_proj": {"bits": 8}}}, r"down_proj: .* one grid of 4-bit floats for all layers"),
        ({"outliers": 0.01}, r"q_proj: nvfp4 has no place for what"),
        ({"bits": 3}, r"^bits and symmetric are those of grid='nvfp4': leave them out"),
        ({"checkpoint_format": "gptq"}, r"q_proj: gptq holds evenly spaced values alone, got NVFP4Grid"),
        ({"runtime": "vllm-cpu"}, r"vLLM .* on CPUs does not run the grid nvfp4: use integers"),
        ({"reconstruction": "rounding"}, r"TrainRounding cannot train weights on NVFP4Grid"),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_refused_before_the_work(options: dict[str, Any], message: str) -> None:
    given = {"checkpoint_format": "compressed-tensors", "grid": "nvfp4", **options}
    with pytest.raises(ValueError, match=message):
        ptq.compress(MODELS["llama"](), token_ids(8, 16), **given)


def test_names_of_grids() -> None:
    with pytest.raises(ValueError, match=r"grid must be one of .*nvfp4, mxfp4, got 'nf4'"):
        ptq.Recipe(grid="nf4")
