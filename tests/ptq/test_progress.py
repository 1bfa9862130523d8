"""The bar of a compression."""

from dataclasses import replace

import pytest

from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.progress import LayerBar

REPORT = LayerReport("first", (4, 8), 4.5, 0.01, 0.01, 0.0, 0, None, None, "", 0.1)
CORRECTED = replace(REPORT, name="last", error_corrected=0.005)


def test_a_bar_shows_the_layers_that_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    bar = LayerBar()
    assert not capsys.readouterr().err  # before there is a layer
    bar(REPORT, 2)
    bar(CORRECTED, 2)
    shown = capsys.readouterr()
    assert not shown.out
    *_, last = shown.err.rstrip().split("\r")
    assert "2/2" in last and "last error 1.00%, corrected 0.50%" in last
    assert shown.err.endswith("\n")  # closed by itself


def test_a_bar_that_is_closed_early_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = LayerBar()
    bar.close()
    bar(REPORT, 2)
    bar.close()
    shown = capsys.readouterr().err
    assert "1/2" in shown and "first error 1.00%" in shown and shown.endswith("\n")


def test_the_first_layers_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left would be none otherwise, until the second layer."""
    bar = LayerBar()
    monkeypatch.setattr(bar, "_started", bar._started - 100)
    bar(REPORT, 3)
    assert bar._bar.format_dict["elapsed"] >= 100
    bar.close()
