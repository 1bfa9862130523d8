"""The progress of commands that take long: bars on a terminal, lines in a pipe or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from opt8bit.ptq import LayerReport

if TYPE_CHECKING:  # an extra brings it
    from rich.console import Console

ShowStep = Callable[[int, float, "float | None"], None]  # step, training loss, validation loss if it was measured
ShowLayer = Callable[[LayerReport, int], None]  # the layer just finished, number of layers


@contextmanager
def training(console: Console, steps: int) -> Iterator[Callable[[str], ShowStep]]:
    """Yields what starts to show a run of so many steps under its name."""
    if not console.is_interactive:
        yield lambda name: _step_lines(console, name, steps)
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[loss]}"),
    )
    with progress.Progress(*columns, console=console) as bars:
        yield lambda name: _step_bar(bars, name, steps)


def _step_bar(bars: Any, name: str, steps: int) -> ShowStep:
    task = bars.add_task(name, total=steps, loss="")

    def show(step: int, loss: float, measured: float | None) -> None:
        bars.update(task, completed=step, loss=f"training loss {loss:.3f}")

    return show


def _step_lines(console: Console, name: str, steps: int) -> ShowStep:
    def show(step: int, loss: float, measured: float | None) -> None:
        if measured is not None:
            console.print(f"{name}: step {step} of {steps}, validation loss {measured:.4f}", soft_wrap=True)

    return show


@contextmanager
def compression(console: Console) -> Iterator[ShowLayer]:
    """Yields what shows each layer with its error before and after correction; a bar has the time left, too."""
    if not console.is_interactive:
        numbers = count(1)
        yield lambda report, layers: console.print(
            f"layer {next(numbers)} of {layers}: {_described(report)}", soft_wrap=True
        )
        return
    from rich import progress

    columns = (
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, console=console) as bars:
        task = bars.add_task("calibrating", total=None)
        yield lambda report, layers: bars.update(task, advance=1, total=layers, description=_described(report))


def _described(report: LayerReport) -> str:
    error = f"{report.name} error {report.error_rounded:.2%}"
    if report.error_corrected == report.error_rounded:
        return error
    return f"{error}, corrected {report.error_corrected:.2%}"
