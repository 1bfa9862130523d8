"""``opt8bit correct`` for an ONNX file: the same file with biases out."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from torch import Tensor

from opt8bit.cli.arrays import array_files, batches_of, choose_rows, read_arrays
from opt8bit.cli.correct import Settings, not_corrected
from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import load_tokenizer
from opt8bit.cli.run_options import RunOptions
from opt8bit.cli.texts import choose_windows, find_text
from opt8bit.ptq import Correction, correct_onnx
from opt8bit.ptq.corrected_onnx.inputs import OnnxInput, batch_size, inputs_of, text_inputs

BATCH = 8  # samples that are run together, where the model takes any number
Batches = list[dict[str, np.ndarray]]


def run(settings: Settings) -> None:
    """Corrects the file, writes another one, and says what was done.

    Raises:
        CommandError: something the user can mend; nothing has been written.
    """
    started = time.perf_counter()
    if settings.output.exists():  # before anything is read
        raise CommandError(f"{settings.output} exists: give another place for the result")
    try:
        inputs = inputs_of(Path(settings.checkpoint))
        calibration, held_out = _batches(settings, inputs)
        correction = correct_onnx(
            settings.checkpoint,
            settings.reference,
            calibration,
            output=settings.output,
            held_out=held_out,
            order=settings.how.order,
            statistic=settings.how.statistic,
            again=settings.again,
            verify=settings.verify,
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    print("\n".join(_summary(correction)))
    print("loaded back: its output is the same" if settings.verify else "not verified")
    print(f"{settings.output} written in {time.perf_counter() - started:.0f} s")


def _batches(settings: Settings, inputs: list[OnnxInput]) -> tuple[Batches, Batches | None]:
    """Returns what to calibrate on and what is held out, as the model takes it."""
    size = batch_size(inputs)
    files = array_files(settings.calibration)
    if files:
        _refuse_text_options(settings)
        how = settings.text
        parts = choose_rows(read_arrays(files), samples=how.samples, held_out=how.held_out, seed=how.seed)
        calibration, held_out = (None if part is None else batches_of(part, size or BATCH) for part in parts)
    else:
        calibration, held_out = (_of_text(part, inputs, size or BATCH) for part in _windows(settings))
    assert calibration is not None
    return _full(calibration, size, "calibration"), None if held_out is None else _full(held_out, size, "held-out data")


def _windows(settings: Settings) -> tuple[Tensor, Tensor | None]:
    text = find_text(settings.calibration, settings.text_column)
    place = settings.tokenizer or str(Path(settings.reference).parent)
    tokenizer = load_tokenizer(place, trust_remote_code=settings.trust_remote_code)
    return choose_windows(text, tokenizer, **settings.text.windows)


def _of_text(ids: Tensor | None, inputs: list[OnnxInput], size: int) -> Batches | None:
    return None if ids is None else [text_inputs(inputs, part.numpy()) for part in ids.split(size)]


def _full(batches: Batches, size: int | None, name: str) -> Batches:
    """Returns the batches of the size that a model takes, where it takes one only.

    Raises:
        CommandError: there are none.
    """
    full = [batch for batch in batches if size is None or len(next(iter(batch.values()))) == size]
    if not full:
        raise CommandError(f"the model takes batches of {size} samples, and the {name} has fewer")
    return full


def _refuse_text_options(settings: Settings) -> None:
    """
    Raises:
        CommandError: something is said about a text, and there is none.
    """
    about = {
        "--text-column": settings.text_column,
        "--tokenizer": settings.tokenizer,
        "--trust-remote-code": settings.trust_remote_code,
        "--sequence-length": settings.text.sequence_length != RunOptions.sequence_length,
        "--bos": settings.text.bos,
    }
    for flag, value in about.items():
        if value:
            raise CommandError(f"{flag} is about a text, and {settings.calibration} has arrays")


def _summary(correction: Correction) -> list[str]:
    """Returns what was done, in a few lines."""
    kept = [module for module in correction.modules if module.is_kept]
    new = sum(module.place == "new bias" for module in kept)
    lines = [f"biases in {len(kept)} layers, {new} of them new"]
    held_out = correction.held_out
    if held_out is None:
        lines.append("all corrections are kept: nothing is held out to choose by")
    else:
        groups = len(held_out.kept) + len(held_out.dropped)
        lines.append(
            f"loss against the reference on held-out data: {held_out.before:.6g} before, {held_out.after:.6g} after; "
            f"{len(held_out.kept)} of {groups} groups of corrections are kept"
        )
    return [*lines, *not_corrected(correction.skipped)]
