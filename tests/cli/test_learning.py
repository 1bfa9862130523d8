"""``opt8bit compress --learn``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import MODELS, shaken

from opt8bit.cli import progress
from opt8bit.cli.main import main
from opt8bit.ptq.refinement import training

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIONS = ["--samples", "48", "--sequence-length", "32", "--group-size", "16", "--bits", "2", "--learn", "fast"]


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A model whose codes leave something to learn, with the tokenizer of the other."""
    path = folder / "shaken"
    shaken(MODELS["llama"]()).save_pretrained(path)
    for file in (folder / "llama").glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    ids = torch.randint(96, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "text.txt").write_text(" ".join(map(str, ids)))
    return path


def compress(model: Path, output: Path, *arguments: str) -> int:
    text = str(model / "text.txt")
    return main(["compress", str(model), "--calibration", text, "--output", str(output), *OPTIONS, *arguments])


def test_a_checkpoint_is_written_of_what_was_learned(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(model, tmp_path / "out", "--for", "transformers") == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "opt8bit" / "report.json").read_text())
    refined = report["refined"]
    assert refined["steps"] == 16 and refined["kept"] and refined["best"] < refined["start"]
    lines = [line for line in printed.err.splitlines() if line.startswith("learning, step ")]
    assert lines[0] == f"learning, step 0 of 16: held-out loss {refined['start']:.4f}"
    assert lines[-1].startswith("learning, step 16 of 16: held-out loss ") and lines[-1].endswith(" 0 s left")
    said = f"learned: the loss on windows that were not learned from is {refined['best']:.4f} nats a token, "
    assert f"{said}{refined['start']:.4f} before (16 steps, 0 dropped)" in printed.out
    assert report["recipe"]["learn"] == "fast"
    recipe = tmp_path / "out" / "opt8bit" / "recipe.json"
    assert json.loads(recipe.read_text())["learn"] == "fast"
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_learning_begins_again_after_a_kill_and_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(model, tmp_path / "whole", "--no-verify", "--format", "dense") == 0
    gradients, calls = training._gradients, 0

    def interrupted(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return gradients(*args)

    monkeypatch.setattr(training, "_gradients", interrupted)
    arguments = [model, tmp_path / "out", "--no-verify", "--format", "dense"]
    assert compress(*arguments) == 130
    capsys.readouterr()
    assert compress(*arguments, "--resume") == 0
    assert "2 blocks are finished already" in capsys.readouterr().err and calls == 3 + 16
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_a_bar_tells_the_progress_on_a_terminal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "has_bars", lambda: True)
    assert compress(model, tmp_path / "out", "--no-verify", "--format", "dense") == 0
    shown = capsys.readouterr().err
    assert "learning" in shown and "16/16" in shown and "held-out" in shown


def test_a_text_that_is_too_short_is_refused_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(model, tmp_path / "out", "--samples", "1", "--held-out", "0") == 2
    said = capsys.readouterr().err
    assert "learning takes 2 sequences of text at least, one of them to choose by, got 1" in said
    assert not list(tmp_path.iterdir())
