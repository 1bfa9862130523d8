"""Warnings that point at the user's line, however many of this package's and torch's functions lie between."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

PASSED_OVER = ("opt8bit", "torch")  # torch.optim wraps every step, torch.compiler parts of it


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that lies outside of this package and of torch.

    ``skip_file_prefixes`` of ``warnings.warn`` would do the same, but Python has it only since 3.12.
    """
    level, frame = 1, sys._getframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def first_of(words: Sequence[str], count: int, separator: str = ", ") -> str:
    """Returns the first words of a list in one line, and dots if there are more than ``count``."""
    return separator.join(words[:count]) + (" ..." if len(words) > count else "")


def first_reasons(reasons: Mapping[str, str], count: int) -> str:
    """Returns the first names in one line, each with its reason, and dots if there are more than ``count``."""
    return first_of([f"{name or 'the model'} ({why})" for name, why in reasons.items()], count, "; ")


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silences the warnings of a package's logger inside the context."""
    logger = logging.getLogger(name)
    had = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(had)
