import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import opt8bit
from opt8bit.backends import available
from opt8bit.cli import demo, progress
from opt8bit.cli.demo_settings import DemoSettings
from opt8bit.cli.main import main

TINY = DemoSettings(
    steps=6,
    batch=2,
    context=16,
    width=64,
    heads=2,
    layers=1,
    eval_every=3,
    eval_batches=2,
)


def test_info_names_versions_and_what_serves_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["cpu"].startswith(available("cpu")[0])
    assert lines["threads"].startswith(str(torch.get_num_threads()))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"opt8bit {opt8bit.__version__}\n"


def test_info_names_what_in_the_environment_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPT8BIT_BACKEND", "abacus")
    assert main(["info"]) == 2
    assert "opt8bit info: the environment's OPT8BIT_BACKEND must be one of" in capsys.readouterr().err


def test_demo_compares_two_runs_and_saves_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = demo.run(TINY, None, tmp_path / "plot.png")
    base, ours = runs
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in base.losses] == [3, 6] == [step for step, _ in ours.losses]
    assert base.losses[0][1] == pytest.approx(ours.losses[0][1], rel=0.01)
    assert 0 < ours.state_bytes < base.state_bytes
    printed = capsys.readouterr().out
    assert f"{ours.final_loss:.4f}" in printed and f"{base.final_loss:.4f}" in printed
    assert "plot.png" in printed


def test_table_and_picture_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = demo.run(dataclasses.replace(TINY, steps=7), None, tmp_path / "plot.png")
    table = capsys.readouterr().out
    axes = demo.draw(runs).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    for run, line, label in zip(runs, axes.get_lines(), labels, strict=True):
        assert list(line.get_xdata()) == [3, 6, 7]
        assert line.get_ydata()[-1] == run.final_loss
        loss, size = f"{run.final_loss:.4f}", f"{run.state_bytes / 1e6:.2f} MB"
        assert run.name in label and loss in label and size in label
        (row,) = [row for row in table.splitlines() if run.name in row and "MB" in row]
        assert loss in row and size in row


def test_lines_tell_the_progress_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = demo.run(TINY, None, tmp_path / "plot.png")
    expected = [
        f"{run.name}: step {step} of 6, validation loss {loss:.4f}" for run in runs for step, loss in run.losses
    ]
    assert capsys.readouterr().err.splitlines() == expected
    assert len(expected) == 4


def test_a_bar_shows_no_loss_before_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "has_bars", lambda: True)
    with progress.training("AdamW", 6):
        pass
    shown = capsys.readouterr().err
    assert "AdamW" in shown and "0/6" in shown and "nan" not in shown and "loss" not in shown
    with progress.training("AdamW", 6) as show:
        show(6, 2.5, None)
    assert "6/6" in (shown := capsys.readouterr().err) and "training loss 2.500" in shown


@pytest.mark.parametrize(
    ("is_terminal", "term", "expected"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_bars_are_for_terminals(is_terminal: bool, term: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", term)
    assert progress.has_bars() == expected


def test_a_run_repeats_itself() -> None:
    data = torch.randint(256, (4000,))
    losses = [
        demo.train("8 bits", demo.OPTIMIZERS["opt8bit.AdamW8bit"], data, data, TINY, lambda *seen: None).losses
        for _ in range(2)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no such file"], "cannot read --text no such file"),
        (["--plot", "no such folder/plot.png"], "cannot write --plot no such folder/plot.png"),
        (["--plot", "plot.xyz"], "cannot write --plot plot.xyz: its ending must be one of "),
    ],
)
def test_what_cannot_work_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "2", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_short_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert main(["demo", "--text", str(text), "--plot", str(tmp_path / "plot.png")]) == 2
    assert "must have at least 2580 bytes, got 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "argument --steps: must be at least 2, got 1"),
        (
            ["--seed", str(2**64)],
            f"argument --seed: must be from -9223372036854775808 to 18446744073709551615, got {2**64}",
        ),
    ],
)
def test_numbers_are_checked(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert message in capsys.readouterr().err


def test_two_steps_are_enough(tmp_path: Path) -> None:
    base, ours = demo.run(dataclasses.replace(TINY, steps=2), None, tmp_path / "plot.png")
    assert [step for step, _ in base.losses] == [2] == [step for step, _ in ours.losses]
