"""Reads hyper-parameters and options of parameter groups, and checks them when they change, not on every step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.options import DEFAULTS, check_options, is_on_device

# Options that plans depend on.
PLANNED = ("block_size", "fused", "stochastic_rounding", "compensation", "seed", "capturable", "offload")


class Facts(NamedTuple):
    """Holds what a group says, and what follows from it."""

    said: tuple[Any, ...]  # its hyper-parameters and options
    is_fixed: bool  # no one of them can change its value and stay the same object
    rule: Rule
    hyper: Mapping[str, Any]  # of the rule, by name: numbers, but for an lr on a device
    planned: tuple[Any, ...]  # what plans depend on: the rule, and some options


class FactsOfGroups:
    """The facts of an optimizer's groups, as long as they hold.

    Args:
        names: of the groups' entries that are hyper-parameters or options.
        checked_rule: returns the rule of a group, or raises ValueError for hyper-parameters that it cannot have.
    """

    def __init__(
        self,
        names: Collection[str],
        checked_rule: Callable[[dict[str, Any]], Rule],
    ) -> None:
        self._said = itemgetter(*DEFAULTS, *(name for name in names if name not in DEFAULTS))
        self._checked_rule = checked_rule
        self._known: dict[int, Facts] = {}

    def of(self, index: int, group: dict[str, Any]) -> Facts:
        """Returns the facts of a group.

        Args:
            index: of the group in its optimizer.

        Raises:
            ValueError: an option or a hyper-parameter has been given a value that it cannot have.
        """
        said = self._said(group)
        known = self._known.get(index)
        if known and known.is_fixed and all(map(is_, said, known.said)):
            return known
        options = slice(len(DEFAULTS))
        if not known or not all(map(is_, said[options], known.said[options])):
            check_options(group)
        rule = self._checked_rule(group)
        planned = (rule, *(group[name] for name in PLANNED))
        if known and planned == known.planned:
            planned = known.planned  # the same object is compared faster
        facts = Facts(said, all(map(_is_fixed, said)), rule, hyper_of(rule, group), planned)
        self._known[index] = facts
        return facts


def _is_fixed(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return not isinstance(value, (Tensor, list))


def hyper_of(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a rule's hyper-parameters from a parameter group, in the rule's order; beta1 is the first of its betas.

    They are numbers, except an ``lr`` that lies on a device.
    """
    values = {**group, **{f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}}
    chosen = {name: values[name] for name in rule.hyper}
    return {
        name: value.item() if isinstance(value, Tensor) and not (name == "lr" and is_on_device(value)) else value
        for name, value in chosen.items()
    }
