"""``opt8bit verify``: tells whether a written checkpoint loads as what was made."""

from __future__ import annotations

from opt8bit import ptq
from opt8bit.cli.errors import CommandError


def run(folder: str, trust_remote_code: bool) -> None:
    """
    Raises:
        CommandError: it does not, or there is nothing to compare with.
    """
    try:
        verification = ptq.verify(folder, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    if not verification.is_right:
        raise CommandError(f"{folder} does not load as what was made:\n{verification}")
    print(f"{folder} loads as what was made: {verification}")
