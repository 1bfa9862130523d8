"""The usual step: like the one before it in all but gradients and hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor

from opt8bit.backends import wanted_backend
from opt8bit.optim.absent import PLAIN
from opt8bit.optim.asked import Asked
from opt8bit.optim.facts import Facts

GRAD = attrgetter("grad")
USUAL_TYPES = {*PLAIN, type(None)}  # of gradients


class Usual(NamedTuple):
    """Identifies usual steps: all parameters of all groups are plain, and have their states.

    Nearly all steps of a training are like that. That nothing else is looked at then makes steps of small models fast.
    """

    planned: list[tuple[Any, ...]]  # of each group, as in its facts
    counts: list[int]  # of each group's parameters
    wanted_backend: str | None

    @classmethod
    def of(cls, asked: Sequence[Asked]) -> Usual | None:
        """Returns what the steps are known by that are like the one asked for, or None if that is not a usual one."""
        if not all(each.is_usual for each in asked):
            return None
        return cls([each.planned for each in asked], [len(each.owners) for each in asked], asked[0].wanted_backend)

    def tensors(
        self, groups: Sequence[Mapping[str, Any]], facts: Sequence[Facts], state: Mapping[Tensor, Any]
    ) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Returns the parameters and their gradients, or None if a step with them is not such a one."""
        lists = [group["params"] for group in groups]
        params = list(chain.from_iterable(lists))
        if [each.planned for each in facts] != self.planned or list(map(len, lists)) != self.counts:
            return None
        if wanted_backend() != self.wanted_backend or len(params) != len(state) or not all(map(is_, params, state)):
            return None
        grads = list(map(GRAD, params))
        return (params, grads) if USUAL_TYPES.issuperset(map(type, grads)) else None
