"""Checks the arguments of methods and recipes."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real


def check_at_least(name: str, value: float, least: float) -> None:
    """
    Raises:
        ValueError: ``value`` is not a finite number of at least ``least``.
    """
    if not _is_number(value) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """
    Raises:
        ValueError: ``value`` is not an integer, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """
    Raises:
        ValueError: ``value`` is neither True nor False: a string, say, which would count as True.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """
    Raises:
        ValueError: ``value`` is not a number from 0 to 1.
    """
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")


def check_one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """
    Raises:
        ValueError: ``value`` is none of the words that are allowed.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """
    Raises:
        ValueError: ``value`` is not a positive, finite number.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
