"""``opt8bit compress``: a trained language model in, a rounded and corrected one out."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opt8bit import ptq
from opt8bit.cli.group_sizes import default_group_size
from opt8bit.cli.models import CommandError, load_tokenizer, open_model
from opt8bit.cli.progress import ShowLayer, compression
from opt8bit.cli.recipes import Overrides
from opt8bit.cli.texts import choose_windows, find_text
from opt8bit.ptq import ranks
from opt8bit.ptq.compress import polished
from opt8bit.ptq.export import write
from opt8bit.ptq.export.folder import WORK, new_folder
from opt8bit.ptq.methods import Method
from opt8bit.ptq.placement import OF_KEYS
from opt8bit.ptq.report import FOLDER, PICTURE, write_report

SERVED_SYMMETRIC = (4, 8)  # bits that servers run on symmetric grids alone
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Settings:
    """What the command takes, as it takes it."""

    model: str
    calibration: str
    text_column: str | None
    output: Path
    method: str
    bits: int
    group_size: int | None
    symmetric: bool | None
    range: str | None
    correct: str
    statistic: str
    polish: bool | None
    outliers: float
    outlier_structure: str | None
    act_order: bool | None
    error_propagation: float | None
    samples: int
    held_out: int
    sequence_length: int
    format: str
    seed: int
    dtype: str | None
    resume: bool
    verify: bool
    trust_remote_code: bool
    overrides: Overrides = ()


# These are not the recipe.
ABOUT_THE_RUN = ("model", "calibration", "text_column", "output", "resume", "verify", "trust_remote_code")


def run(settings: Settings) -> None:
    """Loads, compresses, writes, verifies, and says what was done.

    Raises:
        CommandError: something the user can mend; nothing has been written, or what is finished is kept to go on from.
    """
    started = time.perf_counter()
    try:
        _method(settings)
        # First what can fail at once: a folder that cannot be written is known before hours are spent.
        with _processes(), _folder(settings) as folder, _progress() as see:
            text = find_text(settings.calibration, settings.text_column)
            tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
            calibration, held_out = choose_windows(
                text,
                tokenizer,
                length=settings.sequence_length,
                samples=settings.samples,
                held_out=settings.held_out,
                seed=settings.seed,
            )
            source = open_model(settings.model, trust_remote_code=settings.trust_remote_code, dtype=settings.dtype)
            settings = _with_defaults(settings, source.model)
            result = ptq.compress(
                source,
                calibration,
                **_options(settings),
                correct=settings.correct,
                statistic=settings.statistic,
                error_propagation=settings.error_propagation,
                overrides=_overrides(settings),
                held_out=held_out,
                work=folder / WORK,
                checkpoint_format=settings.format,
                see=see,
            )
            is_first = ranks.rank() == 0
            _part()  # what loads checkpoints would have all processes at it
            if not is_first:
                return
            write(result, folder, settings.format, tokenizer if source.files is None else None)
            about = {"model": settings.model, "format": settings.format, "recipe": _recipe(settings)}
            written = write_report(result, folder, about)
            (written / RECIPE).write_text(json.dumps(_recipe(settings), indent=2) + "\n")
            verified = _verified(settings, folder)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    print(summary(result, settings.output, time.perf_counter() - started, verified))


@contextmanager
def _processes() -> Iterator[None]:
    """Joins the other processes, if torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        _part()


def _part() -> None:
    """Leaves the other processes, if there are some."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _folder(settings: Settings) -> Iterator[Path]:
    """Where to write: made by the first process, and known to all."""
    if ranks.rank():
        folder = ranks.gathered(None)[0]
        if folder is None:
            raise CommandError("the first process has ended")
        yield folder
        return
    told = False
    try:
        with new_folder(settings.output, resume=settings.resume) as folder:
            ranks.gathered(folder)
            told = True
            yield folder
    except OSError:
        if not told:
            ranks.gathered(None)
        raise


def _verified(settings: Settings, folder: Path) -> str:
    """What is known of the written checkpoint.

    Raises:
        ValueError: it is wrong.
    """
    if not settings.verify:
        return "not verified"
    try:
        verification = ptq.verify(folder, scratch=folder / WORK, trust_remote_code=settings.trust_remote_code)
    except ImportError as error:
        return f"not verified: {str(error).strip().splitlines()[0]}"
    if not verification.is_right:
        raise ValueError(f"what was written does not load as what was made:\n{verification}")
    return f"loaded back: {verification}"


def _with_defaults(settings: Settings, model: torch.nn.Module) -> Settings:
    """What depends on the model or on other options filled in."""
    symmetric, group_size = settings.symmetric, settings.group_size
    if symmetric is None:
        symmetric = settings.format != "dense" and settings.bits in SERVED_SYMMETRIC
    if group_size is None:
        group_size = default_group_size(model, settings.overrides)
    return replace(settings, symmetric=symmetric, group_size=group_size)


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "method": _method(settings),
        "bits": settings.bits,
        "group_size": settings.group_size or None,
        "symmetric": bool(settings.symmetric),
        "range": settings.range,
    }


def _overrides(settings: Settings) -> dict[str, dict[str, Any] | None]:
    """By pattern; where one comes twice the last is meant, in its place."""
    found: dict[str, dict[str, Any] | None] = {}
    for override in settings.overrides:
        pattern = override["layers"]
        given = {name: value for name, value in override.items() if name not in ("layers", "skip")}
        if "method" in given:  # what the whole run says of its own method is not meant
            given = {"act_order": None, "polish": None, "outliers": 0.0, "outlier_structure": None, **given}
        found.pop(pattern, None)
        try:
            found[pattern] = None if override.get("skip") else _options(replace(settings, **given))
        except (CommandError, ValueError) as error:
            raise CommandError(f"override of {pattern!r}: {error}") from error
    return found


def _recipe(settings: Settings) -> dict[str, Any]:
    """What a recipe file says."""
    return {name: value for name, value in asdict(settings).items() if name not in ABOUT_THE_RUN and value is not None}


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


@contextmanager
def _progress() -> Iterator[ShowLayer]:
    """Shows the layers that are finished, if this is the first process.

    Raises:
        CommandError: rich is not installed.
    """
    if ranks.rank():
        yield lambda report, layers: None
        return
    try:
        console = importlib.import_module("rich.console").Console()
    except ImportError as error:
        raise CommandError(f"{error.name} is missing: pip install 'opt8bit[compress]'") from error
    with compression(console) as see:
        yield see


def summary(result: ptq.Result, output: Path, seconds: float, verified: str) -> str:
    """What the command prints at the end."""
    rows = result.report
    worst = max(rows, key=lambda row: row.error_corrected)
    lines = [
        f"{len(rows)} layers, {result.weights:,} weights at {result.bits_per_weight:.2f} bits each, scales counted",
        f"largest error of an output, squared: {worst.error_corrected:.2%} of its own square, {worst.name}",
    ]
    costs = [row.symmetry_cost for row in rows if row.symmetry_cost is not None]
    if costs:
        mean = sum(costs) / len(costs)
        lines.append(f"symmetric grids, which servers ask for, raise the error of rounding to nearest by {mean:.0%}")
    if result.recipe.correct != "none":
        placed = [row for row in rows if row.bias_place]
        lines.append(f"{len(placed)} biases, {result.bias_bytes:,} bytes more")
        keys = [row for row in rows if row.note == OF_KEYS]
        if keys:
            lines.append(f"not corrected: {len(keys)} layers: {OF_KEYS}")
        lines += [
            f"not corrected: {row.name}: {row.note}"
            for row in rows
            if row.note and not row.bias_place and row not in keys
        ]
        skipped = Counter(row.note for row in placed if row.note)
        lines += [f"of {count} layers: {note}" for note, count in skipped.items()]
    quality = result.quality
    if quality is not None:
        lines.append(
            f"perplexity on {quality.tokens:,} held-out tokens of the calibration text: "
            f"{quality.perplexity:.3f} before, {quality.perplexity_compressed:.3f} after; "
            f"KL divergence {quality.kl_divergence:.4f} nats a token"
        )
    lines.append(verified)
    lines.append(f"{output} written in {seconds:.0f} s; {FOLDER}/{PICTURE} shows every layer")
    return "\n".join(lines)
