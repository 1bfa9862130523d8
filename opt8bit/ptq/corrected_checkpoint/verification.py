"""Loads a corrected checkpoint as a user does, or, where transformers lacks what that takes, as it was read before."""

from __future__ import annotations

from pathlib import Path

from opt8bit.ptq.model.source import Checkpoint
from opt8bit.ptq.verification import Verification
from opt8bit.ptq.verify import loads, verify, verify_unpacked


def verify_corrected(folder: Path, source: Path, *, trust_remote_code: bool = False) -> tuple[Verification, str | None]:
    """Compares a written checkpoint with what was made.

    Args:
        folder: of the checkpoint.
        source: of the one that was corrected.
        trust_remote_code: whether Python files that come with the model may run.

    Returns:
        What was found, and why transformers has not loaded it; None where it has.

    Raises:
        ValueError: the checkpoint cannot be loaded.
    """
    written = Checkpoint(folder, trust_remote_code=trust_remote_code, unpack=True)
    coded = written.files.coded
    try:
        if coded is None or not coded.rounds_inputs:
            return verify(folder, trust_remote_code=trust_remote_code), None
        why = "it would round the inputs of layers, too, which was not done here"
    except ImportError as error:
        why = str(error).strip().splitlines()[0]
    except ValueError as error:
        if loads(source, trust_remote_code=trust_remote_code):
            raise
        why = str(error).strip().splitlines()[0]  # nor does it load the source
    return verify_unpacked(folder, written, trust_remote_code), why
