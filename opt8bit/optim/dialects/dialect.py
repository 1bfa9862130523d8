"""What a dialect is: a form of state dict that can be loaded, read into the names of our rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.reading import Read, described

Group = Mapping[str, Any]  # as it was saved
State = Mapping[Any, Any]  # of one parameter, as it was saved


class Place(NamedTuple):
    """Whose state is read."""

    where: str  # the parameter, in words
    param: Tensor
    rule: Rule
    others: Collection[str]  # states that the optimizer has with other hyper-parameters: they may lie about


class Dialect(NamedTuple):
    """A form of state dict. Both readers raise ValueError for what cannot be one."""

    is_of: Callable[[Group, Sequence[State]], bool]  # whether a group and its states have it
    hyper: Callable[[str, Group], Group]  # (family of the rule, group) -> the group, in our names
    states: Callable[[Place, Group, State], Read]  # empty where training begins anew
    unused: Collection[str]  # hyper-parameters that are dropped where the optimizer has none of that name
    missing: Collection[str]  # hyper-parameters that it may lack: the optimizer keeps its own


def family(rule: Rule) -> str:
    """What the variants of a rule have in common, as ``adam`` of ``adam_amsgrad``."""
    return rule.name.partition("_")[0]


def value_of(place: Place, state: State, name: str) -> Any:
    """Raises ValueError where a state is missing."""
    if name not in state:
        raise ValueError(f"{place.where}, of shape {tuple(place.param.shape)}, lacks the state {name!r}")
    return state[name]


def refuse_unknown(place: Place, state: State, known: Collection[str]) -> None:
    """Raises ValueError where there is a state of another optimizer, or of none."""
    for name in state:
        if name not in known:
            expected = ", ".join(["step", *place.rule.states])
            raise ValueError(f"{place.where} has a state {described(name)}, but {place.rule.name} has {expected}")
