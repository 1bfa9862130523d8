"""``opt8bit convert``: what it prints, what it refuses, and what it takes along."""

import json
from pathlib import Path

import pytest
from small import WINDOWS

from opt8bit.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:not every server runs")  # what is as small as here


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "out"
    texts = ["--calibration", str(folder / "text.txt"), "--output", str(output), "--bits", "4", "--method", "rtn"]
    assert main(["compress", str(folder / "llama"), *texts, *WINDOWS, "--group-size", "32"]) == 0
    return output


def test_what_is_known_goes_along(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(packed), "--format", "mlx", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/out written in the format mlx: 14 layers; codes and scales are those of the source\n"
    )
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "report.html")]) == 0
    held_out = json.loads((packed / "opt8bit" / "report.json").read_text())["held_out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| perplexity | {held_out['perplexity']:.3f} | {held_out['perplexity_compressed']:.3f} |" in card
    assert "Measured by opt8bit" in card and "| base model | llama |" in card and "mlx_lm.generate" in card
    assert not (tmp_path / "out" / "BASE_README.md").exists()  # a card that was written here is no base's


@pytest.mark.filterwarnings("ignore:the GGUF file gets no tokenizer")
def test_figures_of_other_weights_stay_behind(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (packed / "tokenizer.json").rename(tmp_path / "tokenizer.json")  # which llama.cpp has no kind for
    (packed / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    command = ["convert", str(packed), "--format", "gguf", "--round-again", "--output", str(tmp_path / "out")]
    try:
        assert main(command) == 0
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).rename(packed / name)
    assert not (tmp_path / "out" / "opt8bit" / "report.json").exists()
    assert "perplexity" not in (tmp_path / "out" / "README.md").read_text()


def test_refusals(packed: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {folder / "llama": "is not packed: opt8bit compress rounds weights", tmp_path: "has no config.json"}
    for model, message in cases.items():
        assert main(["convert", str(model), "--format", "gptq", "--output", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("opt8bit convert: ") and message in printed.err
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(packed), "--format", "dense", "--output", str(packed)]) == 2
    assert capsys.readouterr().err == f"opt8bit convert: {packed} exists: give the name of a folder that does not\n"
