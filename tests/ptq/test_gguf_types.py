"""The types of blocks of llama.cpp's files: their bytes, their grids, and models whose weights are rounded to them."""

import ctypes
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf import LAYER, compressed, export, ids, make, stored, tokenizer
from torch import Tensor

from opt8bit import ptq
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.inspect import inspect, unpacked_weight
from opt8bit.ptq.model.gguf.blocks import pack_blocks, unpack_blocks
from opt8bit.ptq.model.gguf.grids import scheme_of_type, type_of
from opt8bit.ptq.model.gguf.superblocks import LAYOUTS, pack_superblocks, unpack_superblocks
from opt8bit.ptq.model.packed.layout import dequantized
from opt8bit.ptq.rounding.engines import PlainEngine, engine_for
from opt8bit.ptq.rounding.groups import group_numbers
from opt8bit.ptq.rounding.linear_algebra import inverse_factor
from opt8bit.ptq.rounding.rounder import objective
from opt8bit.ptq.rounding.scales import refit_scales
from opt8bit.quant.affine import AffineGrid
from opt8bit.quant.evenly_spaced import EvenlySpaced
from opt8bit.quant.superblocks import SuperblockGrid
from opt8bit.quant.weight import QuantizedWeight
from opt8bit.recipe import Recipe
from opt8bit.recipe.gguf_types import GGUF_TYPES

gguf: Any = pytest.importorskip("gguf")

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "initializer_range": 0.05}
EVEN = [kind for kind in GGUF_TYPES if isinstance(scheme_of_type(kind, "mse").grid, EvenlySpaced)]
# By how much the fit may err more than the best pair of a fine search does; both stop at some resolution.
OF_THE_BEST = 1.02


def random_bytes(kind: str) -> Tensor:
    """Blocks of any bytes, except for float16 numbers that are not finite."""
    about = GGUF_TYPES[kind]
    blocks = torch.randint(
        256, (5, 3, about.block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for place in NUMBERS[kind]:
        blocks[..., place + 1] &= 0xBF  # an exponent below that of infinity
    return blocks


NUMBERS = {  # where a block has float16 numbers
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def unpacked(kind: str, blocks: Tensor) -> tuple[Tensor, Any]:
    return (unpack_superblocks if kind in LAYOUTS else unpack_blocks)(kind, blocks)


def decoded(kind: str, blocks: Tensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType[kind]))


def test_sizes_are_those_of_ggml() -> None:
    for kind, about in GGUF_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (about.block, about.block_bytes)
        assert about.file_type in gguf.LlamaFileType.__members__


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_any_bytes_are_read_and_written_again(kind: str) -> None:
    blocks = random_bytes(kind)
    codes, numbers = unpacked(kind, blocks)
    again = (pack_superblocks if kind in LAYOUTS else pack_blocks)(kind, codes, numbers)
    assert torch.equal(again, blocks)
    with pytest.raises(ValueError, match=rf"blocks of {kind} must be \(out, blocks, {blocks.shape[-1]} bytes\)"):
        unpacked(kind, blocks[..., 1:])


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_values_are_those_that_gguf_decodes(kind: str) -> None:
    blocks = random_bytes(kind)
    codes, numbers = unpacked(kind, blocks)
    scheme = scheme_of_type(kind, "mse")
    grid: Any = scheme.grid
    if kind in ("Q4_0", "Q5_0", "Q8_0"):
        params = grid.params_type(numbers[0].double(), torch.full(numbers[0].shape, 2.0 ** (grid.bits - 1)))
    else:
        params = grid.params_type(*(number.double() for number in numbers))
    values = grid.decode(
        codes.unflatten(1, (-1, scheme.group_size or 0)), type(params)(*(p[..., None] for p in params))
    )
    assert torch.equal(values.flatten(1).float(), decoded(kind, blocks))


@pytest.mark.parametrize("kind", EVEN)
def test_rounded_weights_are_what_gguf_decodes(kind: str) -> None:
    weight, statistics = layer()
    rounded = ptq.GPTQ().round(weight, statistics, scheme_of_type(kind, "mse"))
    (part,) = rounded.parts
    pack = pack_superblocks if kind in LAYOUTS else pack_blocks
    blocks = pack(kind, part.codes, part.params)  # type: ignore[operator]
    assert torch.equal(decoded(kind, blocks), rounded.dequantize())
    assert 8 * blocks.numel() == rounded.stored_bits == GGUF_TYPES[kind].bits_per_weight * weight.numel()


def layer(columns: int = 256, dtype: torch.dtype = torch.float32) -> tuple[Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, columns, generator=generator, dtype=torch.float64) * 0.05
    weight[0], weight[1, :16] = 0, 0.25
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(600, columns, generator=generator, dtype=torch.float64) @ (mixed + torch.eye(columns))
    return weight.to(dtype), InputStatistics(x.T @ x / len(x))


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_method_rounds_onto_the_grid(kind: str) -> None:
    weight, statistics = layer()
    scheme = scheme_of_type(kind, "mse")
    hessian = statistics.required("second_moments")
    near = float(objective(weight, ptq.RTN().round(weight, statistics, scheme).dequantize(), hessian))
    for method in (
        ptq.GPTQ(),
        ptq.GPTQ(act_order=False),
        ptq.QuantEase(sweeps=3),
        ptq.QuantEase(start=ptq.GPTQ(), sweeps=2, refits=2),
    ):
        rounded = method.round(weight, statistics, scheme)
        assert float(objective(weight, rounded.dequantize(), hessian)) < 0.85 * near, method
        assert float(rounded.dequantize()[0].abs().max()) < 1e-6  # of zeros
        (part,) = rounded.parts
        assert torch.equal(
            rounded.dequantize(), QuantizedWeight.of(rounded.dequantize(), part.params, scheme).dequantize()
        )
        check_stored(part.grid, part.params)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("size", [1e-9, 1e-7])
def test_weights_below_what_float16_holds_keep_numbers(kind: str, size: float) -> None:
    weight, statistics = layer()
    method = ptq.QuantEase(start=ptq.GPTQ(), sweeps=2, refits=3)
    rounded = method.round(weight * size, statistics, scheme_of_type(kind, "mse"))
    assert float(rounded.dequantize().abs().max()) <= 1.1 * float((weight * size).abs().max()) + 2**-24
    check_stored(rounded.grids[0], rounded.parts[0].params)


def test_a_super_scale_is_never_zero() -> None:
    grid = SuperblockGrid(2, together=16, sub_bits=4)
    found = grid.super_stored(torch.tensor([0.0, 1e-9, -1e-9, 0.1, 1e9, -1e9], dtype=torch.float64))
    assert found.tolist() == [2.0**-24] * 3 + [float(torch.tensor(0.1).half()), 65504.0, -65504.0]


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_unit_of_importance_does_not_matter(size: float) -> None:
    weight, _ = layer()
    grid = scheme_of_type("Q2_K", "mse").grid
    groups, importance = weight.unflatten(1, (-1, 16)), torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(grid.fit(groups, importance * size), grid.fit(groups, importance), strict=True):
        assert float((found != expected).float().mean()) < 0.05  # where two choices are equally good


def check_stored(grid: Any, params: Any) -> None:
    """Asserts that all numbers can be stored as they are."""
    floats = [name for name in params._fields if name not in ("zero_point", "sub_scale", "sub_minimum")]
    for name in floats:
        number = getattr(params, name)
        assert torch.equal(number, number.half().to(number.dtype)), name
    if isinstance(grid, SuperblockGrid):
        low, high = grid.sub_limits
        subs = [params.sub_scale] if grid.centred else [params.sub_scale, params.sub_minimum]
        for sub in subs:
            assert torch.equal(sub, sub.round()) and low <= float(sub.min()) <= float(sub.max()) <= high
        for number in (params.super_scale, params.super_minimum):
            assert bool((number.unflatten(1, (-1, grid.together)).diff(dim=-1) == 0).all())


@pytest.mark.parametrize("importance", [False, True])
def test_scale_and_minimum_are_as_good_as_a_fine_search_finds(importance: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(20, 32, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.rand(32, generator=generator, dtype=torch.float64).square() if importance else None
    grid = AffineGrid(3, range="mse", scale_dtype=torch.float16)
    line = grid.fit(block, weights)
    check_stored(grid, line)

    def error(scale: Tensor, minimum: Tensor) -> Tensor:
        codes = ((block - minimum) / scale).round().clamp(0, 7)
        return ((codes * scale + minimum - block).square() * (1 if weights is None else weights)).sum(-1)

    low, high = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for below in torch.linspace(-0.1, 0.5, 61).tolist():
        for above in torch.linspace(-0.1, 0.5, 61).tolist():
            start, end = low + below * (high - low), high - above * (high - low)
            best = torch.minimum(best, torch.nan_to_num(error((end - start) / 7, start), torch.inf))
    found = error(line.scale, line.minimum)
    assert float(found.sum() / best.sum()) < OF_THE_BEST
    plain = AffineGrid(3, scale_dtype=torch.float16).fit(block)
    assert bool((found <= error(plain.scale, plain.minimum)).all())


def llama_cpp(weight: Tensor, kind: str, importance: Tensor) -> Tensor:
    """The weight as llama.cpp's own quantizer rounds it."""
    package: Any = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("*.so"))))
    number, about = gguf.GGMLQuantizationType[kind], GGUF_TYPES[kind]
    rounded = np.zeros((len(weight), weight.shape[1] // about.block * about.block_bytes), np.uint8)
    kept = importance.float().contiguous()
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    addresses = weight.data_ptr(), rounded.ctypes.data
    library.ggml_quantize_chunk(int(number), *addresses, 0, *weight.shape, kept.data_ptr())
    return torch.from_numpy(gguf.quants.dequantize(rounded, number))


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_fit_errs_less_than_llama_cpps(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator) * 0.05
    importance = torch.randn(512, generator=generator).exp()
    scheme = scheme_of_type(kind, "mse")
    groups = weight.unflatten(1, (-1, scheme.group_size or 0))
    params = scheme.grid.fit(groups, importance.unflatten(0, groups.shape[1:]))

    def error(rounded: Tensor) -> float:
        return float(((rounded - weight).square() * importance).sum())

    assert error(scheme.grid.nearest(groups, params).flatten(1)) < error(llama_cpp(weight, kind, importance))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K"])
def test_the_layer_objective_is_below_llama_cpps(kind: str) -> None:
    weight, statistics = layer(512)
    hessian = statistics.required("second_moments")
    rounded = ptq.QuantEase(start=ptq.GPTQ(), sweeps=5, refits=3).round(weight, statistics, scheme_of_type(kind, "mse"))
    theirs = objective(weight, llama_cpp(weight, kind, hessian.diagonal()), hessian)
    assert float(objective(weight, rounded.dequantize(), hessian)) < 0.75 * float(theirs)


@pytest.mark.parametrize("kind", EVEN)
def test_the_compiled_loops_are_the_plain_ones(kind: str) -> None:
    weight, statistics = layer(512)
    scheme = scheme_of_type(kind, "mse")
    engine, plain = engine_for(weight, scheme.grid), PlainEngine(scheme.grid)
    if isinstance(engine, PlainEngine):
        pytest.skip("no kernels are installed")
    hessian = statistics.required("second_moments")
    size = scheme.groups_of(weight)
    params, factor = plain.fit(weight, size), inverse_factor(hessian, 0.01).float()
    group_of, hessian = group_numbers(weight, size), hessian.float()
    start = plain.error_feedback(weight, factor, torch.ones(512), group_of, params)[0]
    for loop in (
        lambda engine: engine.error_feedback(weight, factor, torch.ones(512), group_of, params)[0],
        lambda engine: engine.coordinate_descent(weight, start, hessian, group_of, params, 3),
    ):
        ours, expected = (QuantizedWeight.of(loop(each), params, scheme).dequantize() for each in (engine, plain))
        # Where two values are equally near, the last bits of a sum decide, and all columns behind it follow.
        assert float((ours != expected).any(1).float().mean()) < 0.3
        found, wanted = (float(objective(weight, each, hessian)) for each in (ours, expected))
        assert found == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("kind", EVEN)
def test_refitted_numbers_never_raise_the_objective(kind: str) -> None:
    weight, statistics = layer(dtype=torch.float64)
    hessian = statistics.required("second_moments")
    (part,) = ptq.GPTQ().round(weight, statistics, scheme_of_type(kind, "mse")).parts
    refitted = refit_scales(weight @ hessian, part, hessian)
    check_stored(part.grid, refitted.params)

    def each_row(rounded: Tensor) -> Tensor:
        return (((weight - rounded) @ hessian) * (weight - rounded)).sum(1)

    before, after = each_row(part.dequantize()), each_row(refitted.dequantize())
    assert bool((after <= before * (1 + 1e-12)).all()) and float(after.sum()) < 0.99 * float(before.sum())


def test_a_refitted_line_is_that_of_least_squares() -> None:
    weight, statistics = layer(32, torch.float64)
    hessian = statistics.required("second_moments")
    scheme = replace(scheme_of_type("Q4_1", "mse"), grid=AffineGrid(4, range="mse"))
    (part,) = ptq.GPTQ().round(weight, statistics, scheme).parts
    refitted = refit_scales(weight @ hessian, part, hessian)
    root = torch.linalg.cholesky(hessian).T  # uᵀ H u = |root u|²
    for row in range(2, len(weight)):
        features = torch.stack([part.codes[row].double(), torch.ones(32, dtype=torch.float64)], 1)
        expected = torch.linalg.lstsq(root @ features, root @ weight[row]).solution
        found = torch.stack([number[row, 0] for number in refitted.params])
        assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in GGUF_TYPES if kind not in ("Q4_0", "Q5_0", "Q8_0")])
def test_a_file_of_each_type_is_read_back(kind: str, tmp_path: Path) -> None:
    made = compressed(make(**WIDE), bits=4, grid=kind)
    assert made.bits_per_weight == pytest.approx(GGUF_TYPES[kind].bits_per_weight)
    folder = export(made, tmp_path)
    verification = ptq.verify(folder)  # by llama.cpp, too, where it is installed
    assert verification.is_right and verification.error < 1e-12
    layers = {layer.grid for name, layer in inspect(folder).layers.items() if ".layers." in name}
    assert layers == {kind} == {type_of(own.scheme) for own in made.plan.layers.values() if own is not None}
    reader = gguf.GGUFReader(folder / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[GGUF_TYPES[kind].file_type]
    change = made.changes[f"{LAYER.replace('1', '0')}.weight"]
    assert isinstance(change, QuantizedWeight)
    values, expected = dequantized(*unpacked_weight(folder, LAYER.replace("1", "0"))[:4]), change.dequantize()
    # A zero point that is no integer is rounded to float32, and so is the difference to it.
    assert float((values - expected).abs().max()) <= 2 * torch.finfo(torch.float32).eps * float(expected.abs().max())


@pytest.mark.parametrize(("kind", "fallback"), [("Q2_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0")])
def test_rows_that_superblocks_do_not_divide_fall_back(
    kind: str, fallback: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        made = compressed(make(**{**WIDE, "intermediate_size": 96}), bits=4, grid=kind)
    note = f"{fallback} in place of {kind}, as 256 does not divide its 96 inputs"
    assert f"model.layers.0.mlp.down_proj: {note}" in caplog.messages
    assert {row.name for row in made.report if row.note == note} == {"model.layers.0.mlp.down_proj"}
    kinds = {name: tensor.tensor_type.name for name, tensor in stored(export(made, tmp_path)).items()}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == (fallback, kind)


def test_overrides_mix_types_and_widths() -> None:
    overrides = {"*.down_proj": {"grid": "Q6_K"}, "*.up_proj": {"bits": 8}, "*.q_proj": {"grid": "IQ4_NL"}}
    made = compressed(make(**WIDE), bits=4, grid="Q2_K", overrides=overrides)
    found = {name.rpartition(".")[2]: type_of(own.scheme) for name, own in made.plan.layers.items() if own is not None}
    expected = {"down_proj": "Q6_K", "up_proj": "Q8_0", "q_proj": "IQ4_NL", "k_proj": "Q2_K", "gate_proj": "Q2_K"}
    assert {name: found[name] for name in expected} == expected
    recipe = Recipe(grid="Q2_K", overrides=overrides)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    plain = compressed(make(**WIDE), overrides={"*.down_proj": {"grid": "Q6_K"}})
    assert type_of(plain.plan.layers["model.layers.0.mlp.down_proj"].scheme) == "Q6_K"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "Q4_2"}, "grid must be one of Q4_0, Q4_1, .*Q6_K, .*, got 'Q4_2'"),
        ({"grid": "Q4_K", "bits": 5}, "bits, symmetric and group_size are those of grid='Q4_K': leave"),
        ({"grid": "Q4_K", "group_size": 32}, "bits, symmetric and group_size are those of grid='Q4_K': leave"),
        ({"grid": "Q4_1", "runtime": "vllm"}, "grid='Q4_1' is for the formats gguf and dense, got 'comp"),
        ({"bits": 3}, r"gguf holds symmetric grids of 4, 5, 8 bits, got 3 bits, symmetric: or grid as one of Q4_0, .*"),
        ({"grid": "Q2_K", "learn": "fast"}, "TrainScales cannot train weights on SuperblockGrid"),
        ({"grid": SuperblockGrid(2, together=4, sub_bits=4), "group_size": 16}, "gguf holds the grids of ggml's types"),
        ({"grid": SuperblockGrid(2, together=32, sub_bits=4), "group_size": 16, "checkpoint_format": "dense", "runtime":
          None}, "superblocks of 512 weights do not divide the 256 inputs"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_type_needs_is_said_before_the_work(options: dict[str, Any], message: str) -> None:
    def see(*of_a_layer: Any) -> None:
        pytest.fail("the work has begun")

    model = make(**WIDE)
    with pytest.raises(ValueError, match=message):
        ptq.compress(model, ids(), **{"runtime": "llama.cpp", "method": "rtn", "see": see, **options})


def test_rows_that_no_block_divides_are_refused_by_name() -> None:
    message = r"down_proj: IQ4_NL takes rows of a multiple of 32 weights, got 48: leave the layer as it is, by an overr"
    with pytest.raises(ValueError, match=message):
        compressed(make(**{**WIDE, "intermediate_size": 48}), bits=4, grid="IQ4_NL")


@pytest.mark.parametrize("kind", ["Q4_1", "IQ4_NL"])
def test_trained_scales_are_stored(kind: str, tmp_path: Path) -> None:
    engine = ptq.Reconstruction(steps=2)
    made = compressed(make(**WIDE), grid=kind, reconstruction=engine)
    before = compressed(make(**WIDE), grid=kind)
    name = "model.layers.0.mlp.down_proj.weight"
    parts = [each.changes[name].parts[0] for each in (made, before)]  # type: ignore[union-attr]
    assert not torch.equal(parts[0].params.scale, parts[1].params.scale)
    assert torch.equal(parts[0].params.scale.sign(), parts[1].params.scale.sign())
    check_stored(parts[0].grid, parts[0].params)
    assert ptq.verify(export(made, tmp_path)).is_right


def test_a_dense_checkpoint_has_the_values_of_a_type() -> None:
    made = ptq.compress(make(**WIDE), ids(), grid="Q4_K", method="rtn", checkpoint_format="dense")
    assert made.bits_per_weight == 4.5


def test_the_command_takes_a_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from opt8bit.cli.main import main

    make(**WIDE).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    arguments = ["compress", str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt")]
    arguments += ["--output", str(tmp_path / "out"), "--samples", "4", "--sequence-length", "16"]
    assert main([*arguments, "--for", "llama.cpp", "--grid", "Q3_K"]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("3-bit Q3_K") == 7
    recipe = json.loads((tmp_path / "out" / "opt8bit" / "recipe.json").read_text())
    assert (
        recipe["grid"] == "Q3_K" and "llama-cli --model" in (tmp_path / "out" / "opt8bit" / "report.html").read_text()
    )
