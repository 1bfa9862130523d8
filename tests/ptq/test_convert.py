"""A converted checkpoint has the codes and scales of its source, byte for byte what would have been written at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import GROUP, KINDS, Kind, ct_header, gptq, group_header, rounded, write_packed
from safetensors.torch import load_file, save_file
from toys import GATED, MODELS, _make, token_ids

from opt8bit import ptq
from opt8bit.ptq.conversion import convert as conversion
from opt8bit.ptq.model.checkpoint_files import CheckpointFiles

pytestmark = pytest.mark.filterwarnings("ignore:not every server runs")  # what is as small as here
FORMATS = ("compressed-tensors", "gptq", "mlx", "dense")
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def result() -> ptq.Result:
    """Symmetric grids of 4 bits, some of whose scales are negative, which all formats hold."""
    return ptq.compress(MODELS["llama"](), token_ids(), bits=4, group_size=32, symmetric=True)


@pytest.fixture(scope="module")
def exported(result: ptq.Result, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("exported")
    return lambda format: (
        folder / format if (folder / format).exists() else ptq.export(result, folder / format, format=format)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "llama"
    MODELS["llama"]().save_pretrained(path)
    return path


def same_weights(found: Path, expected: Path) -> None:
    """The files of two checkpoints have the same tensors, to the byte, and configurations say the same."""
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()
    tensors, others = (load_file(each / "model.safetensors") for each in (found, expected))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", FORMATS[:-1])
def test_every_pair_is_what_would_have_been_written(
    source: str, format: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    scales = load_file(exported("compressed-tensors") / "model.safetensors")[f"{LAYER}.weight_scale"]
    assert (scales < 0).any()
    done = ptq.convert(exported(source), tmp_path / "out", format=format)
    assert (done.layers, done.group_sizes, done.again, done.errors) == (14, (), {}, {})
    same_weights(tmp_path / "out", exported(format))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if format != "gptq":  # which transformers loads only with further packages
        assert ptq.verify(tmp_path / "out").is_right


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_other_grids(bits: int, symmetric: bool, tmp_path: Path) -> None:
    made = ptq.compress(MODELS["llama"](), token_ids(), bits=bits, group_size=16, symmetric=symmetric, method="rtn")
    packed = ptq.export(made, tmp_path / "packed")
    ptq.convert(packed, tmp_path / "again", format="compressed-tensors")
    same_weights(tmp_path / "again", packed)
    ptq.convert(packed, tmp_path / "dense", format="dense")
    same_weights(tmp_path / "dense", ptq.export(made, tmp_path / "expected", format="dense"))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_others_become_dense(kind: str, base: Path, tmp_path: Path) -> None:
    values = write_packed(base, tmp_path / "packed", KINDS[kind], shards=2)
    ptq.convert(tmp_path / "packed", tmp_path / "out", format="dense")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())
    assert not (tmp_path / "out" / "quantize_config.json").exists()  # it would say that there are codes
    assert (tmp_path / "out" / "notes" / "README.md").read_text() == "as it was"


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("gptq", "gptq-order")])
def test_checkpoints_of_others_keep_their_codes(kind: str, base: Path, tmp_path: Path) -> None:
    values = write_packed(base, tmp_path / "packed", KINDS[kind])
    ptq.convert(tmp_path / "packed", tmp_path / "out", format="compressed-tensors")
    files = CheckpointFiles(tmp_path / "out", unpack=True)
    for name, tensor in files.tensors(files.where):
        assert torch.equal(tensor, values[name]), name
    header = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = header["config_groups"].values()
    assert group["weights"]["num_bits"] == 4
    assert group["weights"]["symmetric"] == (kind == "compressed-tensors")


def symmetric_gptq() -> Kind:
    return Kind(lambda w: rounded(w, symmetric=True), lambda r: gptq(r, 4), KINDS["gptq"].header | {"bits": 4})


def test_larger_groups_are_cut(tmp_path: Path) -> None:
    wide: Any = _make("Llama", **{**GATED, "hidden_size": 512, "num_hidden_layers": 1})()
    overrides: Any = {"*.down_proj": {"group_size": 64}}
    options: Any = {"bits": 4, "group_size": 256, "symmetric": True, "method": "rtn", "overrides": overrides}
    made = ptq.compress(wide, token_ids(), **options)
    packed = ptq.export(made, tmp_path / "packed")
    done = ptq.convert(packed, tmp_path / "out", format="mlx")
    assert done.group_sizes == ((256, 128),)
    ptq.convert(tmp_path / "out", tmp_path / "dense", format="dense")
    same_weights(tmp_path / "dense", ptq.export(made, tmp_path / "expected", format="dense"))


REFUSED = {
    "asymmetric to gptq": ("awq", "gptq", "its zero points are not all in the middle, and gptq holds symmetric grids"),
    "groups of 16 to mlx": ("awq", "mlx", "mlx has groups of 32, 64, 128 weights, got 16"),
    "zero points beyond": ("gptq", "compressed-tensors", "a zero point is larger than the largest code"),
    "order": ("gptq-order", "compressed-tensors", "the inputs of a group do not follow one another"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_rounded_again_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    kind, format, message = REFUSED[case]
    write_packed(base, tmp_path / "packed", KINDS[kind])
    with pytest.raises(ValueError, match=message):
        ptq.convert(tmp_path / "packed", tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_rounding_again_is_to_nearest(base: Path, tmp_path: Path) -> None:
    values = write_packed(base, tmp_path / "packed", KINDS["awq"])
    done = ptq.convert(tmp_path / "packed", tmp_path / "out", format="gptq", round_again=True)
    assert len(done.again) == len(done.errors) == 14
    files = CheckpointFiles(tmp_path / "out", unpack=True)
    for name, error in done.errors.items():
        weight, found = values[name].double(), files.read([name])[name].double()
        expected = float((found - weight).square().sum() / weight.square().sum())
        assert error == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert 0 < max(done.errors.values()) < 0.1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Codes and scales, some of them rounded again, of packed" in card


def in_bfloat16(path: Path) -> None:
    """Has a checkpoint compute in bfloat16, with scales in float16 as they are."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    tensors = load_file(path / "model.safetensors")
    other = {n: t if t.dtype != torch.float32 else t.bfloat16() for n, t in tensors.items()}
    save_file(other, path / "model.safetensors", metadata={"format": "pt"})


def test_scales_that_the_dtype_does_not_hold(base: Path, tmp_path: Path) -> None:
    write_packed(base, tmp_path / "packed", symmetric_gptq())
    in_bfloat16(tmp_path / "packed")
    with pytest.raises(ValueError, match="has scales of bfloat16, which does not hold those that are stored"):
        ptq.convert(tmp_path / "packed", tmp_path / "out", format="compressed-tensors")
    done = ptq.convert(tmp_path / "packed", tmp_path / "out", format="compressed-tensors", round_again=True)
    assert max(done.errors.values()) < 2**-16  # scales are wrong by 2^-9 at most, squared
    source, found = (CheckpointFiles(tmp_path / name, unpack=True) for name in ("packed", "out"))
    name = f"{LAYER}.weight"
    codes, expected = (conversion_codes(files, name) for files in (found, source))
    assert torch.equal(codes.codes, expected.codes)
    assert torch.equal(codes.scale.float(), expected.scale.bfloat16().float())


def conversion_codes(files: CheckpointFiles, name: str) -> Any:
    from opt8bit.ptq.conversion.codes import codes_of

    return codes_of(files, name)


def test_packed_heads_become_dense_only(base: Path, tmp_path: Path) -> None:
    write_packed(base, tmp_path / "packed", symmetric_gptq())
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    head = rounded(tensors.pop("lm_head.weight"), symmetric=True)
    tensors |= {f"lm_head.{part}": value for part, value in gptq(head, 4).items()}
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight is packed and outside of the model's blocks"):
        ptq.convert(tmp_path / "packed", tmp_path / "out", format="compressed-tensors")
    ptq.convert(tmp_path / "packed", tmp_path / "out", format="dense")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head.values)


def test_layers_that_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    overrides: Any = {"*.0.*": None}
    made = ptq.compress(
        MODELS["llama"](), token_ids(), bits=4, group_size=32, symmetric=True, method="rtn", overrides=overrides
    )
    packed = ptq.export(made, tmp_path / "packed")
    ptq.convert(packed, tmp_path / "out", format="mlx")
    same_weights(tmp_path / "out", ptq.export(made, tmp_path / "expected", format="mlx"))
    with pytest.raises(ValueError, match="gptq has no word for layers that stay as they are"):
        ptq.convert(packed, tmp_path / "never", format="gptq")


def test_what_is_no_source(base: Path, exported: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not packed: opt8bit compress rounds weights"):
        ptq.convert(base, tmp_path / "out", format="gptq")
    with pytest.raises(ValueError, match=r"format must be one of compressed-tensors, .*got 'awq'"):
        ptq.convert(exported("gptq"), tmp_path / "out", format="awq")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        ptq.convert(exported("gptq"), tmp_path / "there", format="mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("part", ["qweight", "scales", "norm"])
def test_what_is_written_is_compared(
    part: str, exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(result: Any, folder: Path, format: str) -> None:
        shutil.copytree(exported("gptq"), folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        name = "model.norm.weight" if part == "norm" else f"{LAYER}.{part}"
        tensors[name] = tensors[name] + 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(conversion, "write", write)
    with pytest.raises(ValueError, match=r"has another (codes|scale) in what|model.norm.weight is another tensor"):
        ptq.convert(exported("compressed-tensors"), tmp_path / "out", format="gptq")
    assert not list(tmp_path.iterdir())


def test_headers_by_name_are_read(base: Path, tmp_path: Path) -> None:
    """As llm-compressor writes it: groups of targets, and what is left out."""
    kind = KINDS["compressed-tensors"]
    write_packed(base, tmp_path / "packed", kind._replace(header=ct_header(group_header(4, True, ["re:.*_proj$"]))))
    ptq.convert(tmp_path / "packed", tmp_path / "out", format="gptq")
    header = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (header["quant_method"], header["bits"], header["group_size"]) == ("gptq", 4, GROUP)


@pytest.mark.filterwarnings("ignore:the GGUF file gets no tokenizer")
def test_gguf_keeps_the_codes_of_blocks(tmp_path: Path) -> None:
    """Embeddings and head, which it stores in 8 bits, are rounded, and so have to be asked for."""
    pytest.importorskip("gguf")
    wide: Any = _make("Llama", **{**GATED, "hidden_size": 64, "num_hidden_layers": 1})().bfloat16()
    made = ptq.compress(wide, token_ids(), bits=4, group_size=64, symmetric=True)
    packed = ptq.export(made, tmp_path / "packed")
    with pytest.raises(ValueError, match="outside of the blocks: gguf stores embeddings and head in few bits"):
        ptq.convert(packed, tmp_path / "out", format="gguf")
    done = ptq.convert(packed, tmp_path / "out", format="gguf", round_again=True)
    assert done.group_sizes == ((64, 32),)
    assert sorted(done.errors) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert 0 < max(done.errors.values()) < 1e-4
    with pytest.raises(ValueError, match="is a GGUF file, which is not converted"):
        ptq.convert(tmp_path / "out", tmp_path / "back", format="dense")
