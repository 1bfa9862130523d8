"""Loads a corrected checkpoint as a user does, or, where transformers lacks what that takes, as it was read before."""

from __future__ import annotations

from pathlib import Path

from opt8bit.ptq.model.source import Checkpoint
from opt8bit.ptq.verify import Verification, verify, verify_model


def verify_corrected(folder: Path, *, trust_remote_code: bool = False) -> tuple[Verification, str | None]:
    """Compares a written checkpoint with what was made.

    Args:
        folder: of the checkpoint.
        trust_remote_code: whether Python files that come with the model may run.

    Returns:
        What was found, and why transformers has not loaded it; None where it has.

    Raises:
        ValueError: the checkpoint cannot be loaded.
    """
    try:
        return verify(folder, trust_remote_code=trust_remote_code), None
    except ImportError as error:
        why = str(error).strip().splitlines()[0]
    source = Checkpoint(folder, trust_remote_code=trust_remote_code, unpack=True)
    coded, dropped = source.files.coded, source.without_place
    parts = [part for name in dropped for part in ((name,) if coded is None else coded.parts(name))]
    return verify_model(folder, source.copy(), parts, trust_remote_code=trust_remote_code), why
