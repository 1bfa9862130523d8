"""``opt8bit correct`` for ONNX files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as models
import pytest
from onnx_models import arrays, mean_error, network, rounded, run

from opt8bit.cli.main import main

pytestmark = [
    pytest.mark.skipif(not models.IS_INSTALLED, reason="onnx and onnxruntime are not installed"),
    pytest.mark.filterwarnings("ignore"),  # of the packages' own
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    model = network()
    models.onnx().save(model, str(tmp_path / "float.onnx"))
    models.onnx().save(rounded(model), str(tmp_path / "quantized.onnx"))
    np.savez(tmp_path / "images.npz", x=arrays(0, 40, 3, 8, 8))
    return tmp_path


def correct(folder: Path, calibration: Path, *more: str, output: str = "out.onnx") -> int:
    command = ["correct", str(folder / "quantized.onnx"), "--reference", str(folder / "float.onnx")]
    return main([*command, "--calibration", str(calibration), "--output", str(folder / output), *more])


def load(path: Path) -> Any:
    return models.onnx().load(str(path))


def test_a_file_of_arrays(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert correct(files, files / "images.npz") == 0
    printed = capsys.readouterr().out
    assert "loss against the reference on held-out data: " in printed
    assert "loaded back: its output is the same" in printed and "out.onnx written in" in printed
    held_out = {"x": arrays(0, 40, 3, 8, 8)[32:]}
    paths = (files / f"{name}.onnx" for name in ("float", "quantized", "out"))
    y, before, after = (run(load(path), held_out, ["y"])["y"] for path in paths)
    assert np.square(after - y).mean() < np.square(before - y).mean()


def test_a_folder_of_arrays_and_no_choice(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = files / "images"
    folder.mkdir()
    for i, part in enumerate(np.split(arrays(0, 40, 3, 8, 8), 2)):
        np.savez(folder / f"{i}.npz", x=part)
    flags = ("--held-out", "0", "--seed", "3", "--order", "sequential", "--no-verify")
    assert correct(files, folder, *flags) == 0
    printed = capsys.readouterr().out
    assert "biases in 6 layers, 3 of them new\nall corrections are kept" in printed and "not verified" in printed
    data = {"x": arrays(0, 40, 3, 8, 8)}
    y, y_hat = (run(load(files / name), data, ["y"])["y"] for name in ("float.onnx", "out.onnx"))
    before = run(load(files / "quantized.onnx"), data, ["y"])["y"]
    assert np.abs(mean_error(y, y_hat, -1)).max() < 0.5 * np.abs(mean_error(y, before, -1)).max()


def test_models_that_take_one_sample_at_a_time(files: Path) -> None:
    for name in ("float.onnx", "quantized.onnx"):
        model = load(files / name)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        models.onnx().save(model, str(files / name))
    assert correct(files, files / "images.npz") == 0


TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def language_model(tmp_path: Path, folder: Path) -> Path:
    """The model and a tokenizer beside it, and a text."""
    model = models.language_model()
    helper, kinds = models.onnx().helper, models.onnx().TensorProto
    more = {"attention_mask": ["n", "l"], "position_ids": ["n", "l"], "past_key_values.0.key": ["n", 2, "past", 4]}
    for name, dims in more.items():
        kind = kinds.FLOAT if name.startswith("past") else kinds.INT64
        model.graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    models.onnx().save(model, str(tmp_path / "float.onnx"))
    models.onnx().save(rounded(model), str(tmp_path / "quantized.onnx"))
    for name in TOKENIZER:
        (tmp_path / name).write_bytes((folder / "llama" / name).read_bytes())
    (tmp_path / "text.txt").write_bytes((folder / "text.txt").read_bytes())
    return tmp_path


TEXT = ("--samples", "20", "--sequence-length", "16", "--held-out", "6")


def test_a_text(language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert correct(language_model, language_model / "text.txt", *TEXT) == 0
    printed = capsys.readouterr().out
    assert "not corrected: node_keys: it is among those to leave" in printed
    place = tmp_path / "tokenizer"
    place.mkdir()
    for name in TOKENIZER:
        (language_model / name).rename(place / name)
    text = language_model / "text.txt"
    assert correct(language_model, text, *TEXT, "--tokenizer", str(place), output="same.onnx") == 0
    assert (language_model / "out.onnx").read_bytes() == (language_model / "same.onnx").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokenizer", "folder"), "--tokenizer is about a text, and "),
        (("--sequence-length", "16"), "--sequence-length is about a text, and "),
        (("--bos",), "--bos is about a text, and "),
        (("--held-out", "40"), "40 samples are held out, and there are 40: use a smaller --held-out"),
    ],
)
def test_what_is_not_about_arrays(
    files: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert correct(files, files / "images.npz", *flags) == 2
    assert message in capsys.readouterr().err and not (files / "out.onnx").exists()


def test_what_cannot_be_read(files: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "damaged.npz").write_bytes(b"no arrays")
    assert correct(files, files / "damaged.npz") == 2
    assert "damaged.npz cannot be read as arrays" in capsys.readouterr().err
    np.savez(files / "unlike.npz", x=arrays(0, 9, 3, 8, 8), y=arrays(0, 8))
    assert correct(files, files / "unlike.npz") == 2
    assert "all arrays must have as many samples in their first dimension" in capsys.readouterr().err
    assert correct(files, folder / "text.txt", *TEXT, "--tokenizer", str(folder / "llama")) == 2
    assert "a text goes into models that take input_ids, this one takes x: give arrays" in capsys.readouterr().err
    (files / "out.onnx").write_text("")
    assert correct(files, files / "images.npz") == 2
    assert "out.onnx exists" in capsys.readouterr().err
