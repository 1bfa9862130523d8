"""Options: fields of dataclasses that say what they may be. Flags of the command and keys of files come from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from opt8bit.recipe.names import unknown

WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Option:
    """Says what one field may be.

    Attributes:
        kind: type of its values: int, float or bool; or the words that it can be, which may become more.
        help: what it is, for the command's help.
        besides: words that it can be as well, where the kind is bool, with what they are, for the command's help.
        of_layers: whether single layers may have another one.
        several: whether it takes a list of such values.
        least, most: of a number; None for any.
        metavar: what stands for a value in the command's help.
        flag: of the command, without its dashes, where it is not called as the field.
    """

    kind: type | Collection[str]
    help: str
    of_layers: bool = False
    besides: Mapping[str, str] = field(default_factory=dict)
    several: bool = False
    least: int | None = None
    most: int | None = None
    metavar: str | None = None
    flag: str | None = None

    def check(self, where: str, value: Any) -> None:
        """
        Args:
            where: the value comes from, for the message.
            value: which None never is.

        Raises:
            ValueError: the option cannot have it.
        """
        if self.several:
            if not isinstance(value, list | tuple):
                raise ValueError(f"{where} must be a list, got {value!r}")
            for each in value:
                replace(self, several=False).check(f"{where}, each of them,", each)
            return
        if not isinstance(self.kind, type):
            if value not in self.kind:
                raise ValueError(f"{where} must be one of {', '.join(self.kind)}, got {value!r}")
            return
        if value in tuple(self.besides):  # compared, as what is given may have no hash
            return
        allowed = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in allowed:
            words = " or ".join([WORDS[self.kind], *map(repr, self.besides)])
            raise ValueError(f"{where} must be {words}, got {value!r}")
        self.check_size(where, value)

    def check_size(self, where: str, value: float) -> None:
        """
        Raises:
            ValueError: a number is too small or too large.
        """
        low, high = self.least is not None and value < self.least, self.most is not None and value > self.most
        if (low or high) and self.most is None:
            raise ValueError(f"{where} must be at least {self.least}, got {value!r}")
        if low or high:
            raise ValueError(f"{where} must be from {self.least} to {self.most}, got {value!r}")


def option(default: Any, kind: type | Collection[str], help: str, **about: Any) -> Any:
    """Returns a field with a default that is an option; further arguments are attributes of :class:`Option`."""
    return field(default=default, metadata={"option": Option(kind, help, **about)})


def options_of(owner: Any) -> dict[str, Option]:
    """Returns the options among the fields of a dataclass, by name."""
    return {each.name: each.metadata["option"] for each in fields(owner) if "option" in each.metadata}


def values_of(owner: Any) -> dict[str, Any]:
    """Returns what an instance has for its options, without those that are None."""
    values = {name: getattr(owner, name) for name in options_of(owner)}
    return {name: value for name, value in values.items() if value is not None}


def defaults_of(owner: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Returns the defaults of a dataclass's fields, or of those that are named."""
    defaults = {each.name: each.default for each in fields(owner)}
    return defaults if names is None else {name: defaults[name] for name in names}


def check_values(allowed: Mapping[str, Option], values: Mapping[str, Any], also: Iterable[str] = ()) -> None:
    """Checks values by name.

    Args:
        allowed: options by name.
        values: by name.
        also: names that there are besides, for the message.

    Raises:
        ValueError: an option is unknown, or cannot have its value.
    """
    for name, value in values.items():
        if name not in allowed:
            raise ValueError(unknown(name, [*allowed, *also]))
        allowed[name].check(name, value)
