"""Runtimes: which grids, groups and words each gets, and that what it does not run is refused before the work."""

import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import GATED, MODELS, _make, quantized, token_ids

from opt8bit import ptq
from opt8bit.ptq.export import installed
from opt8bit.ptq.inspect import inspect
from opt8bit.ptq.model.source import Checkpoint
from opt8bit.quant.packing import pack, unpack, words_of
from opt8bit.recipe.runtimes import DENSE, PACKED, RUNTIMES, check_reads

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WIDE: dict[str, Any] = {**GATED, "hidden_size": 64, "num_key_value_heads": 4}  # what all runtimes have kernels for
WHOLE = "compressed-tensors-0.17"
# Of each runtime the grids that come out at 2, 3, 4 and 8 bits; None where it is refused.
GRIDS = {
    "vllm": ("asymmetric", "asymmetric", "asymmetric", "asymmetric"),
    "vllm-cpu": (None, None, "asymmetric", None),
    "sglang": (None, None, "asymmetric", "signed"),
    "transformers": ("asymmetric", "asymmetric", "asymmetric", "asymmetric"),
    "llama.cpp": (None, None, "Q4_0", "Q8_0"),
    "mlx": ("signed", "signed", "signed", "signed"),
    WHOLE: ("asymmetric", "asymmetric", "asymmetric", "asymmetric"),
}
# 24 codes of 3 bits, 0 to 7 in turn, as compressed-tensors 0.17.1 and 0.20.1 pack them, and rows and columns of others.
COUNTED = {True: [150652552, 438561562, 4012], False: [-1996831096, -964101434, 250]}
SEVENS_AND_FIVES = {True: [[1073741823, 63], [766958445, 45]], False: [[-1, 15], [1840700269, 11]]}


def wide() -> Any:
    return _make("Llama", **WIDE)()


def compressed(runtime: str | None, see: Any = None, **options: Any) -> ptq.Result:
    return ptq.compress(wide(), token_ids(), method="rtn", runtime=runtime, see=see, **options)


def grids(folder: Path) -> set[tuple[int | None, str | None]]:
    return {(layer.bits, layer.grid) for layer in inspect(folder).layers.values()}


@pytest.mark.filterwarnings("ignore:the GGUF file gets no tokenizer")
@pytest.mark.sampled(5)
@pytest.mark.parametrize("i", range(4), ids=["2", "3", "4", "8"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_runtime_gets_the_grids_that_it_runs_and_is_best_at(runtime: str, i: int, tmp_path: Path) -> None:
    bits, grid = (2, 3, 4, 8)[i], GRIDS[runtime][i]
    if grid is None:
        with pytest.raises(
            ValueError, match=rf"(does not run what would be written:\n  .*|gguf holds .* got) {bits} b"
        ):
            compressed(runtime, _never, bits=bits)
        return
    folder = ptq.export(compressed(runtime, bits=bits), tmp_path / "out")
    embedding = {(8, "Q8_0")} if runtime == "llama.cpp" else set()
    assert grids(folder) == {(bits, grid)} | embedding
    verification = ptq.verify(folder)
    unpacked = runtime in ("mlx", "llama.cpp") or (runtime == WHOLE and bits == 3)
    assert verification.is_right and (verification.unpacked is not None) == unpacked


def _never(*of_a_layer: Any) -> None:
    pytest.fail("the work has begun")


def test_every_runtime_is_tested() -> None:
    assert GRIDS.keys() == RUNTIMES.keys()


@pytest.mark.parametrize(
    ("runtime", "options", "message"),
    [
        ("sglang", {"bits": 8, "symmetric": False}, "SGLang .* 8 bits, asymmetric, groups of 64: use symmetric grids"),
        ("sglang", {"bits": 3}, "does not run 3 bits, symmetric, groups of 64: use 4 or 8 bits, symmetric, or format"),
        (
            "vllm-cpu",
            {"bits": 8},
            "on CPUs does not run 8 bits, symmetric, groups of 64: use 4 bits, or format 'dense'",
        ),
        ("vllm", {"group_size": 8}, "groups of 8: use groups of 16, 32, 64 or 128 or whole rows"),
        ("vllm", {"overrides": {"*.k_proj": {"bits": 8}}}, "NVIDIA GPUs puts these into one matrix, and refuses them"),
        ("vllm", {"checkpoint_format": "gptq", "bits": 4, "symmetric": False}, "gptq is served at 4 and 8 bits"),
        (
            "sglang",
            {"checkpoint_format": "gptq"},
            "'sglang', SGLang .*, reads the formats compressed-tensors and dense",
        ),
        ("transformers", {"checkpoint_format": "gptq"}, "reads the formats compressed-tensors and dense, got 'gptq'"),
        ("mlx", {"bits": 4, "symmetric": False}, "mlx holds symmetric grids of 2, 3, 4, 5, 6, 8 bits, got 4 b"),
        ("mlx", {"bits": 7}, "mlx holds symmetric grids of 2, 3, 4, 5, 6, 8 bits, got 7 bits, symmetric"),
        ("mlx", {"group_size": 16}, "mlx has groups of 32, 64, 128 weights, got 16"),
        ("mlx", {"checkpoint_format": PACKED}, "'mlx', mlx-lm .*, reads the formats mlx and dense, got 'compressed-t"),
        ("vlm", {}, "runtime must be one of vllm, vllm-cpu, sglang, transformers"),
    ],
    ids=str,
)
def test_what_a_runtime_does_not_run_is_refused_before_the_work(
    runtime: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compressed(runtime, _never, work=tmp_path / "work", **options)
    assert not list(tmp_path.iterdir())


def test_shapes_that_a_runtime_lacks_are_refused() -> None:
    for runtime in ("vllm-cpu", "sglang"):
        with pytest.raises(ValueError, match="inputs or outputs are no multiple of"):
            model = _make("Llama", **{**GATED, "intermediate_size": 80})()
            ptq.compress(model, token_ids(), group_size=0, runtime=runtime)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("runtime", ["vllm", "transformers", WHOLE])
def test_other_runtimes_are_not_warned_about(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"transformers": "5.24.0", "compressed-tensors": "0.18.0"}
    monkeypatch.setattr(installed, "version", versions.__getitem__)
    compressed(runtime, bits=3)
    compressed(runtime, bits=3, checkpoint_format="dense")


def test_without_a_runtime_grids_are_as_before(tmp_path: Path) -> None:
    for bits, symmetric in ((4, True), (3, False)):
        result = ptq.compress(MODELS["llama"](), token_ids(), method="rtn", bits=bits, checkpoint_format="dense")
        assert result.recipe.symmetric is False and result.plan.runtime is None
        with pytest.warns(UserWarning, match="not every server runs what will be written"):
            result = ptq.compress(
                MODELS["llama"](), token_ids(), method="rtn", bits=bits, group_size=16, checkpoint_format=PACKED
            )
        assert result.recipe.symmetric is symmetric


@pytest.mark.parametrize("format", ["gptq", "dense"])
def test_formats_beside_the_first(format: str, tmp_path: Path) -> None:
    check_reads("vllm", format)
    result = compressed("vllm", checkpoint_format=format)
    assert result.recipe.symmetric is (format == "gptq")
    ptq.export(result, tmp_path / "out", format=format)
    for runtime in RUNTIMES:
        check_reads(runtime, DENSE)


def test_a_result_is_exported_only_in_formats_that_its_runtime_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads the formats compressed-tensors and dense, got 'gptq'"):
        ptq.export(compressed("sglang", symmetric=True), tmp_path / "out", format="gptq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("runtime", "unused"),
    [("sglang", {"gate_proj", "up_proj", "down_proj"}), ("vllm", set()), ("transformers", set())],
)
def test_biases_that_a_runtime_does_not_use_are_not_made(runtime: str, unused: set[str], tmp_path: Path) -> None:
    result = compressed(runtime, bias_correction="sequential")
    rows = {row.name.rpartition(".")[2]: row for row in result.report}
    noted = {name for name, row in rows.items() if "does not use it" in row.note}
    assert noted == unused and all(rows[name].bias_place is None for name in unused)
    assert {name for name, row in rows.items() if row.bias_place} == rows.keys() - unused - {"k_proj"}
    stored = load_file(ptq.export(result, tmp_path / "out") / "model.safetensors")
    assert {name.split(".")[-2] for name in stored if name.endswith(".bias")} >= {"o_proj"}
    for name in unused:  # LLaMA's switch is for all layers of the block's part: those left are zero
        assert all(not tensor.any() for full, tensor in stored.items() if full.endswith(f"{name}.bias"))


def test_group_sizes_are_those_that_a_runtime_has() -> None:
    odd = {**WIDE, "intermediate_size": 192 + 16}  # 16 divides it, 32 does not
    for runtime, size in (("vllm", 16), ("transformers", 16)):
        with pytest.warns(UserWarning, match="all layers get groups of 16"):
            assert (
                ptq.compress(_make("Llama", **odd)(), token_ids(), method="rtn", runtime=runtime).recipe.group_size
                == size
            )
    with pytest.warns(UserWarning, match="one scale for each row"), pytest.raises(ValueError, match="multiple of 64"):
        ptq.compress(_make("Llama", **odd)(), token_ids(), method="rtn", runtime="sglang")


def test_layers_of_several_widths_get_symmetric_grids(tmp_path: Path) -> None:
    overrides = {"*.down_proj": {"bits": 8}}
    folder = ptq.export(compressed("vllm", overrides=overrides), tmp_path / "out")
    assert grids(folder) == {(4, "signed"), (8, "signed")} and ptq.verify(folder).is_right


def test_grids_that_were_asked_for_are_kept() -> None:
    assert compressed("vllm", symmetric=True).recipe.symmetric is True
    assert compressed("sglang", bits=8, symmetric="restricted").recipe.symmetric == "restricted"


# How words are packed.


def in_words(codes: Iterable[int], bits: int) -> list[int]:
    """Ten to a word at 3 bits, five at 6: one after another from the lowest bit."""
    codes, each = list(codes), 32 // bits
    runs = [codes[i : i + each] for i in range(0, len(codes), each)]
    words = [sum(code << (bits * i) for i, code in enumerate(run)) for run in runs]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("whole_codes", [True, False])
def test_words_of_3_bits_are_those_of_the_package(whole_codes: bool) -> None:
    counted = torch.arange(24)[None] % 8
    assert pack(counted, 3, whole_codes=whole_codes).tolist() == [COUNTED[whole_codes]]
    rows = torch.tensor([[7] * 12, [5] * 12])
    assert pack(rows, 3, whole_codes=whole_codes).tolist() == SEVENS_AND_FIVES[whole_codes]
    assert pack(rows.T, 3, whole_codes=whole_codes).T.tolist() == [[47] * 12]  # zero points, along the outputs


@pytest.mark.parametrize("count", [1, 31, 32, 70])
@pytest.mark.parametrize("bits", range(1, 9))
def test_whole_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits, whole_codes=True)
    assert words.tolist() == [in_words(row, bits) for row in codes.tolist()]
    assert words.shape == (3, words_of(count, bits, whole_codes=True))
    assert torch.equal(unpack(words, bits, count, whole_codes=True), codes)
    if 32 % bits == 0:
        assert torch.equal(words, pack(codes, bits))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("runtime", [WHOLE, "vllm"])
def test_packed_as_the_runtime_reads_them(runtime: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    result = compressed(runtime, bits=bits, symmetric=symmetric)
    folder, whole = ptq.export(result, tmp_path / "out"), runtime == WHOLE
    tensors, contents = load_file(folder / "model.safetensors"), inspect(folder)
    read = Checkpoint(folder, unpack=True).copy()
    for name, layer in contents.layers.items():
        outputs, inputs = layer.shape
        words = words_of(inputs, bits, whole_codes=whole)
        assert tensors[f"{name}.weight_packed"].shape == (outputs, words)
        assert (layer.bits, layer.whole_codes) == (bits, whole)
        if not symmetric:
            codes = quantized(result, name).parts[0].params.zero_point.T.to(torch.int64)
            expected = pack(codes, bits, whole_codes=whole).T
            assert torch.equal(tensors[f"{name}.weight_zero_point"], expected)
        assert torch.equal(read.get_parameter(f"{name}.weight"), quantized(result, name).dequantize())


def test_codes_that_are_wrong_are_found_where_the_package_does_not_read_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = ptq.export(compressed(WHOLE, bits=3), tmp_path / "out")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight_packed"
    assert ptq.verify(folder).is_right and f"compressed-tensors {version('compressed-tensors')}" in str(
        ptq.verify(folder)
    )
    save_file({**tensors, name: tensors[name] ^ 0o4444}, file, {"format": "pt"})
    assert not ptq.verify(folder).is_right


@pytest.mark.skipif(sys.platform == "win32", reason="paths")
def test_recipes_name_the_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from opt8bit.cli.recipes import options_from, read_recipe, recipe_file
    from opt8bit.cli.run_options import RunOptions

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"bits": 3, "runtime": "vllm"}))
    recipe, run = options_from(read_recipe(path))
    assert run == RunOptions(runtime="vllm")
    path.write_text(json.dumps(recipe_file(recipe, run)))
    assert options_from(read_recipe(path)) == (recipe, run)
    assert "runtime" not in recipe_file(recipe, RunOptions())
