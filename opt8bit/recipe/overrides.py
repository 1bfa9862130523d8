"""Options of single layers, by the pattern of their names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from opt8bit.recipe.names import renamed, unknown
from opt8bit.recipe.options import Option

PATTERN, SKIP = "layers", "skip"  # of an override in a file
WHOLE_ROWS = (0, -1)  # in files, where None cannot stand; GPTQ's checkpoints have the other


@dataclass(frozen=True)
class Override:
    """Says what becomes of the layers whose names fit a pattern.

    Args:
        pattern: of names, with ``*``, ``?`` and ``[...]`` as a shell has them.
        options: of a :class:`Recipe`, those of layers, by name; None leaves the layers as they are.
    """

    pattern: str
    options: tuple[tuple[str, Any], ...] | None

    @classmethod
    def of(cls, pattern: str, options: Mapping[str, Any] | None) -> Override:
        """Returns an override in the form in which it is kept."""
        if options is None:
            return cls(pattern, None)
        kept = {"group_size": kept_group_size(options["group_size"])} if "group_size" in options else {}
        return cls(pattern, tuple({**options, **kept}.items()))


def kept_group_size(size: Any) -> Any:
    """Returns a group size as it is kept: None for whole rows, whatever they are called."""
    return None if type(size) is int and size in WHOLE_ROWS else size


def listed_overrides(listed: Any, allowed: Mapping[str, Option], defaults: Mapping[str, Any]) -> tuple[Override, ...]:
    """Returns the overrides that a file lists: objects with a pattern as "layers", and options, or "skip".

    Args:
        listed: as a file has it.
        allowed: options of layers, by name.
        defaults: of theirs, to which an override may go back.

    Raises:
        ValueError: it is no such list.
    """
    if not isinstance(listed, list):
        raise ValueError(f"overrides must be a list, got {listed!r}")
    found = []
    for each in listed:
        if not isinstance(each, Mapping) or not isinstance(each.get(PATTERN), str):
            raise ValueError(f"an override is an object with a pattern of names as {PATTERN!r}, got {each!r}")
        given = renamed({name: value for name, value in each.items() if name != PATTERN})
        if not given:
            raise ValueError(f"an override has some of {', '.join([*allowed, SKIP])}, got {each!r}")
        skip = given.pop(SKIP, False)
        if not isinstance(skip, bool):
            raise ValueError(f"{SKIP} of an override must be true or false, got {skip!r}")
        if skip and given:
            raise ValueError(f"an override that skips its layers has no other options, got {each!r}")
        for name, value in given.items():
            _check_option(name, value, allowed, defaults)
        found.append(Override.of(each[PATTERN], None if skip else given))
    return tuple(found)


def _check_option(name: str, value: Any, allowed: Mapping[str, Option], defaults: Mapping[str, Any]) -> None:
    if name not in allowed:
        raise ValueError(f"an override: {unknown(name, [*allowed, SKIP])}")
    if type(value) is not type(defaults[name]) or value != defaults[name]:
        allowed[name].check(f"{name} of an override", value)


def kept_overrides(given: Any, allowed: Collection[str]) -> tuple[Override, ...]:
    """Returns overrides as a recipe keeps them.

    Args:
        given: a mapping from patterns to options by name, or None; or what was kept before.
        allowed: names of options of layers.

    Raises:
        TypeError, ValueError: they are neither a mapping from patterns to options nor overrides.
    """
    if isinstance(given, tuple) and all(isinstance(each, Override) for each in given):
        return tuple(_kept(each.pattern, _mapping(each.options), allowed) for each in given)
    if not isinstance(given, Mapping | None):
        raise TypeError(f"overrides must be a mapping from patterns of names to options, got {given!r}")
    return tuple(_kept(pattern, options, allowed) for pattern, options in (given or {}).items())


def _mapping(options: tuple[tuple[str, Any], ...] | None) -> dict[str, Any] | None:
    return None if options is None else dict(options)


def _kept(pattern: Any, options: Any, allowed: Collection[str]) -> Override:
    """
    Raises:
        TypeError, ValueError: these are not a pattern and options of layers.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern of overrides must be a string, got {pattern!r}")
    if options is None:
        return Override(pattern, None)
    if not isinstance(options, Mapping):
        raise TypeError(f"overrides[{pattern!r}] must be a mapping of options, or None, got {options!r}")
    options = renamed(options)
    for name in options:
        if name not in allowed:
            raise ValueError(f"overrides[{pattern!r}]: {unknown(name, allowed)}")
    return Override.of(pattern, options)
