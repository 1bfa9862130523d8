"""``opt8bit correct``: a quantized checkpoint in, the same with biases out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import load_tokenizer, open_model, open_unpacked
from opt8bit.cli.progress import logged
from opt8bit.cli.run_options import TEXT_OPTIONS, CorrectionOptions, RunOptions
from opt8bit.cli.texts import choose_windows, find_text
from opt8bit.ptq.corrected_checkpoint.correction import CorrectedCheckpoint, correct_checkpoint
from opt8bit.ptq.corrected_checkpoint.verification import verify_corrected
from opt8bit.ptq.export.folder import new_folder
from opt8bit.ptq.model.memory import return_large_at_once


@dataclass(frozen=True)
class Settings:
    """Holds what the command takes.

    Attributes:
        how: the checkpoint is corrected.
        text: which windows are learned from, and which choose.
        tokenizer: a folder that has it, or an id; None where the reference has it.
    """

    checkpoint: str
    reference: str
    calibration: str
    text_column: str | None
    tokenizer: str | None
    output: Path
    how: CorrectionOptions
    text: RunOptions
    again: bool
    verify: bool
    trust_remote_code: bool


def run(settings: Settings) -> None:
    """Loads both models, corrects, writes, verifies, and says what was done.

    Raises:
        CommandError: something the user can mend; nothing has been written.
    """
    started = time.perf_counter()
    try:
        # First what can fail at once: a folder that cannot be written is known before hours are spent.
        with logged(), new_folder(settings.output) as folder:
            source, done = _corrected(settings, folder)
            verified = _verified(settings, folder, source)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    print("\n".join([*_summary(done), verified]))
    print(f"{settings.output} written in {time.perf_counter() - started:.0f} s")


def _corrected(settings: Settings, folder: Path) -> tuple[Path, CorrectedCheckpoint]:
    """Returns the folder of the checkpoint, and what was done to it. No model is kept."""
    trusted, text = settings.trust_remote_code, settings.text
    found = find_text(settings.calibration, settings.text_column)
    source = open_unpacked(settings.checkpoint, trust_remote_code=trusted)
    return_large_at_once(source.model)
    tokenizer = load_tokenizer(settings.tokenizer or settings.reference, trust_remote_code=trusted)
    calibration, held_out = choose_windows(found, tokenizer, **text.windows)
    done = correct_checkpoint(
        source,
        open_model(settings.reference, trust_remote_code=trusted),
        calibration,
        folder,
        held_out=held_out,
        order=settings.how.order,
        statistic=settings.how.statistic,
        again=settings.again,
        about=_about(settings),
    )
    return source.files.folder, done


def _about(settings: Settings) -> dict[str, Any]:
    texts = {name: getattr(settings.text, name) for name in TEXT_OPTIONS}
    names = {"checkpoint": settings.checkpoint, "reference": settings.reference, "calibration": settings.calibration}
    return {"version": version("opt8bit"), **names, "tokenizer": settings.tokenizer, **asdict(settings.how), **texts}


def _verified(settings: Settings, folder: Path, source: Path) -> str:
    """Returns a sentence on whether the written checkpoint loads as what was made.

    Args:
        settings: of the command.
        folder: of the checkpoint.
        source: of the one that was corrected.

    Raises:
        ValueError: it is wrong.
    """
    if not settings.verify:
        return "not verified"
    verification, why = verify_corrected(folder, source, trust_remote_code=settings.trust_remote_code)
    if not verification.is_right:
        raise ValueError(
            f"what was written does not load as what was made, and nothing is kept:\n{verification}\nif the checkpoint "
            "itself does not load here, use --no-verify"
        )
    if why is None:
        return f"loaded back: {verification}"
    return f"read back: {verification}; transformers has not loaded it: {why}"


def _summary(done: CorrectedCheckpoint) -> list[str]:
    """Returns what was done, in a few lines."""
    correcting = [name for name, bias in done.biases.items() if not bias.is_zero]
    zeros = len(done.biases) - len(correcting)
    beside = f", and zeros in {zeros} that get one with them" if zeros else ""
    lines = [f"biases in {len(correcting)} layers{beside}; {done.bias_bytes:,} bytes more"]
    if done.switches:
        lines.append(f"switched on in config.json: {', '.join(done.switches)}")
    if done.followed:
        lines.append(f"compared with the scales of {len(done.followed)} norms and layers where the checkpoint has them")
    lines.append(_choice(done))
    lines += not_corrected({**done.left, **done.correction.skipped})
    return [*lines, *(f"of {count} layers: {why}" for why, count in Counter(done.not_used.values()).items())]


def not_corrected(skipped: Mapping[str, str]) -> list[str]:
    """Returns a line for each reason why layers are as they were."""
    lines = []
    for why, count in Counter(skipped.values()).items():
        names = [name for name, other in skipped.items() if other == why]
        lines.append(f"not corrected: {names[0] if count == 1 else f'{count} layers, {names[0]} first'}: {why}")
    return lines


def _choice(done: CorrectedCheckpoint) -> str:
    held_out = done.correction.held_out
    if held_out is None:
        return "all corrections are kept: no text is held out to choose by"
    groups = len(held_out.kept) + len(held_out.dropped)
    return (
        f"KL divergence from the reference on the held-out text: {held_out.before:.4f} nats a token before, "
        f"{held_out.after:.4f} after; {len(held_out.kept)} of {groups} groups of corrections are kept"
    )
