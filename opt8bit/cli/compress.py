"""``opt8bit compress``: a trained language model in, a rounded and corrected one out."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opt8bit import ptq
from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import load_tokenizer, open_model
from opt8bit.cli.progress import ShowLayer, ShowRefined, compression, logged, refinement
from opt8bit.cli.recipes import recipe_file
from opt8bit.cli.report.page import page
from opt8bit.cli.report.record import read
from opt8bit.cli.run_options import RunOptions
from opt8bit.cli.summary import summary
from opt8bit.cli.texts import choose_windows, find_text, lacks_bos
from opt8bit.ptq import ranks
from opt8bit.ptq.export import About, write, write_model_card
from opt8bit.ptq.export.card.measured import measured_by
from opt8bit.ptq.export.folder import WORK, new_folder
from opt8bit.ptq.model.memory import return_large_at_once
from opt8bit.ptq.report import FOLDER, PAGE, RECIPE, RUN, write_report
from opt8bit.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Holds what the command takes.

    Attributes:
        recipe: what is to become of the model.
        run: which text is learned from, and what is written.
    """

    model: str
    calibration: str
    text_column: str | None
    output: Path
    recipe: Recipe
    run: RunOptions
    resume: bool
    verify: bool
    trust_remote_code: bool


def run(settings: Settings) -> None:
    """Loads, compresses, writes, verifies, and says what was done.

    Raises:
        CommandError: something the user can mend; nothing has been written, or what is finished is kept to go on from.
    """
    started = time.perf_counter()
    try:
        # First what can fail at once: a folder that cannot be written is known before hours are spent.
        with logged(), _processes(), _folder(settings) as folder, _progress() as shows:
            result, tokenizer = _compressed(settings, folder, *shows)
            is_first = ranks.rank() == 0
            _part()  # what loads checkpoints would have all processes at it
            if not is_first:
                return
            write(result, folder, settings.run.checkpoint_format, tokenizer if result.source.files is None else None)
            recipe = recipe_file(result.recipe, settings.run)
            about = {"model": settings.model, "format": settings.run.checkpoint_format, "recipe": recipe}
            written = write_report(result, folder, about)
            (written / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
            verified = _verified(settings, folder)
            seconds = time.perf_counter() - started
            (written / RUN).write_text(json.dumps(_about_run(settings, verified, seconds), indent=2) + "\n")
            write_model_card(result, folder, settings.run.checkpoint_format, _about_card(settings, recipe, verified))
        # Last, as the page has commands with the name that the folder has taken only now.
        (settings.output / FOLDER / PAGE).write_text(page(read(settings.output)), encoding="utf-8")
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    print(summary(result, settings.output, seconds, verified))


def _about_run(settings: Settings, verified: str, seconds: float) -> dict[str, Any]:
    """Returns what is known of a run besides its recipe and its report."""
    return {
        "calibration": settings.calibration,
        "text_column": settings.text_column,
        "seconds": seconds,
        "verified": verified,
        "measured_by": measured_by(),
    }


def _about_card(settings: Settings, recipe: Mapping[str, Any], verified: str) -> About:
    """Returns what the model card says besides the result. Of folders on this machine it has only the names."""
    text = Path(settings.calibration)
    return About(
        name=settings.output.absolute().name,
        base=settings.model,
        text=text.name if text.exists() else settings.calibration,
        recipe=recipe,
        verified=verified,
    )


def _compressed(settings: Settings, folder: Path, see: ShowLayer, see_step: ShowRefined) -> tuple[ptq.Result, Any]:
    """Returns the compressed model and its tokenizer; what is finished of it is kept in the folder."""
    trusted, options = settings.trust_remote_code, settings.run
    text = find_text(settings.calibration, settings.text_column)
    tokenizer = load_tokenizer(settings.model, trust_remote_code=trusted)
    calibration, held_out = choose_windows(text, tokenizer, **options.windows)
    note = None if options.bos else lacks_bos(tokenizer)
    if note is not None and ranks.rank() == 0:
        print(note, file=sys.stderr)
    source = open_model(settings.model, trust_remote_code=trusted, dtype=options.dtype)
    return_large_at_once(source.model)
    result = ptq.compress(
        source,
        calibration,
        settings.recipe,
        held_out=held_out,
        work=folder / WORK,
        checkpoint_format=options.checkpoint_format,
        runtime=options.runtime,
        see=see,
        see_step=see_step,
    )
    return result, tokenizer


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
    """Makes the folder to write to in the first process, and tells all processes where it is."""
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
    """Returns a sentence on whether the written checkpoint loads as what was made.

    Raises:
        ValueError: it is wrong.
    """
    if not settings.verify:
        return "not verified"
    logger.info("loading what was written, to compare it with what was made")
    try:
        verification = ptq.verify(folder, scratch=folder / WORK, trust_remote_code=settings.trust_remote_code)
    except ImportError as error:
        return f"not verified: {str(error).strip().splitlines()[0]}"
    if not verification.is_right:
        raise ValueError(f"what was written does not load as what was made:\n{verification}")
    return f"loaded back: {verification}"


@contextmanager
def _progress() -> Iterator[tuple[ShowLayer, ShowRefined]]:
    """Shows the layers that are finished, and the steps of a refinement, if this is the first process."""
    if ranks.rank():
        yield lambda report, layers: None, lambda step: None
        return
    with compression() as see, refinement() as see_step:
        yield see, see_step
