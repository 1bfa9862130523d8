"""``opt8bit compress``: a trained language model in, a rounded and corrected one out."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opt8bit import ptq
from opt8bit.cli.models import CommandError, load, tokens
from opt8bit.ptq.compress import polished
from opt8bit.ptq.evaluate import windows
from opt8bit.ptq.export import write
from opt8bit.ptq.export.folder import new_folder
from opt8bit.ptq.methods import Method

METHODS = ("rtn", "gptq", "quantease")


@dataclass(frozen=True)
class Settings:
    """What the command takes, as it takes it."""

    model: str
    calibration: Path
    output: Path
    method: str
    bits: int
    group_size: int
    symmetric: bool
    range: str | None
    correct: str
    statistic: str
    polish: bool | None
    outliers: float
    outlier_structure: str | None
    act_order: bool | None
    error_propagation: float | None
    samples: int
    sequence_length: int
    format: str
    seed: int
    trust_remote_code: bool


def run(settings: Settings) -> None:
    """Loads, compresses, writes, and says what was done.

    Raises:
        CommandError: something the user can mend; nothing has been written.
    """
    started = time.perf_counter()
    try:
        method = _method(settings)
        # First what can fail at once: a folder that cannot be written is known before hours are spent.
        with new_folder(settings.output) as folder, _progress() as see:
            model, tokenizer = load(settings.model, trust_remote_code=settings.trust_remote_code)
            calibration = _calibration(settings, tokenizer)
            result = ptq.compress(
                model,
                calibration,
                method=method,
                bits=settings.bits,
                group_size=settings.group_size or None,
                symmetric=settings.symmetric,
                range=settings.range,
                correct=settings.correct,
                statistic=settings.statistic,
                error_propagation=settings.error_propagation,
                see=see,
            )
            write(result, folder, settings.format, tokenizer)
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    print(summary(result, settings.output, time.perf_counter() - started))


def _method(settings: Settings) -> Method:
    """
    Raises:
        CommandError, ValueError: options contradict each other.
    """
    if settings.act_order is not None and settings.method != "gptq":
        raise CommandError(f"--act-order, on or off, is GPTQ's: it has no meaning for {settings.method}")
    if settings.method == "quantease" and settings.polish is False:
        raise CommandError("quantease is coordinate descent: --no-polish leaves nothing of it")
    if settings.method == "rtn" and settings.outliers:
        raise CommandError("--outliers are chosen by the inputs, which rtn does not look at: use gptq or quantease")
    if settings.outlier_structure is not None and not settings.outliers:
        raise CommandError("--outlier-structure says how the outliers of --outliers F stand: give F, too")
    start: Method = ptq.GPTQ(**_given(act_order=settings.act_order)) if settings.method == "gptq" else ptq.RTN()
    if settings.outliers:
        start = ptq.OutlierQuantEase(settings.outliers, **_given(structure=settings.outlier_structure), start=start)
    polish = settings.method != "rtn" if settings.polish is None else settings.polish
    return polished(start) if polish else start


def _given(**options: Any) -> dict[str, Any]:
    """Those that were; the library has defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}


def _calibration(settings: Settings, tokenizer: Any) -> torch.Tensor:
    """Windows of the text: the first ones, or with a seed any."""
    text = tokens(settings.calibration, tokenizer)
    try:
        found = windows(text, settings.sequence_length, len(text) // settings.sequence_length or 1)
        if len(found) < settings.samples:
            needed, has = settings.samples * settings.sequence_length, len(text)
            raise ValueError(
                f"{settings.samples} samples of {settings.sequence_length} tokens take {needed:,}, it has {has:,}"
            )
    except ValueError as error:
        raise CommandError(f"{settings.calibration}: {error}") from error
    if settings.seed:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(settings.seed))
        found = found[order]
    return found[: settings.samples]


@contextmanager
def _progress() -> Iterator[Callable[[ptq.LayerReport, int], None]]:
    """A bar with the layer, its error before and after correction, and the time left.

    Raises:
        CommandError: rich is not installed.
    """
    try:
        bars: Any = importlib.import_module("rich.progress")
    except ImportError as error:
        raise CommandError(f"{error.name} is missing: pip install 'opt8bit[compress]'") from error
    columns = (
        bars.BarColumn(bar_width=20),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns) as progress:
        task = progress.add_task("calibrating", total=None)

        def see(report: ptq.LayerReport, layers: int) -> None:
            error = f"{report.error_rounded:.2%}"
            if report.error_corrected != report.error_rounded:
                error += f" → {report.error_corrected:.2%}"
            progress.update(task, advance=1, total=layers, description=f"{report.name} error {error}")

        yield see


def summary(result: ptq.Result, output: Path, seconds: float) -> str:
    """What the command prints at the end."""
    rows = result.report
    weights = [math.prod(row.shape) for row in rows]
    bits = sum(row.bits_per_weight * count for row, count in zip(rows, weights, strict=True)) / sum(weights)
    worst = max(rows, key=lambda row: row.error_corrected)
    lines = [
        f"{len(rows)} layers, {sum(weights):,} weights at {bits:.2f} bits each once packed, scales counted",
        f"largest relative error of an output: {worst.error_corrected:.2%}, {worst.name}",
    ]
    if result.recipe.correct != "none":
        placed = [row for row in rows if row.bias_place]
        lines.append(f"{len(placed)} biases, {sum(row.bias_bytes for row in placed):,} bytes more")
        without = [row for row in rows if row.note]
        lines += [f"not corrected: {row.name}: {row.note}" for row in without]
    lines.append(f"{output} written in {seconds:.0f} s")
    return "\n".join(lines)
