"""One choice for each item, of least cost under a budget: exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """Says what an item may be.

    Attributes:
        size: of it, a whole number from 0.
        cost: of it.
    """

    size: int
    cost: float


class _Partial(NamedTuple):
    """The choices for the first items, the last one first."""

    size: int
    cost: float
    chosen: int
    before: _Partial | None


def allocate(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Chooses for each item, so that the sum of the costs is least and that of the sizes within a budget.

    Of partial choices only those are kept that no other beats in size and in cost, so that the result is exact. Where
    the sizes have a common divisor, as layers of few shapes have, those are few.

    Args:
        items: the choices that each of them has.
        budget: for the sizes of all together.

    Returns:
        The number of the choice for each item; of equal costs that of the smaller size.

    Raises:
        ValueError: not even the smallest choices are within the budget, or a cost is not a number.
    """
    for i, choices in enumerate(items):
        for choice in choices:
            if not math.isfinite(choice.cost) or choice.size < 0:
                raise ValueError(f"item {i}: {choice} must have a finite cost and a size from 0")
    least = sum(min(choice.size for choice in choices) for choices in items)
    if least > budget:
        raise ValueError(f"the smallest choices take {least:,} together, more than the budget of {budget:,}")
    # What the items behind need at least: a partial choice that leaves no room for them is none.
    behind = [0]
    for choices in reversed(items):
        behind.append(behind[-1] + min(choice.size for choice in choices))
    partials: list[_Partial | None] = [None]
    for i, choices in enumerate(items):
        room = budget - behind[len(items) - 1 - i]
        partials = list(_extended(partials, choices, room))
    best = partials[-1]  # sizes rise, and costs fall
    chosen: list[int] = []
    while best is not None:
        chosen.append(best.chosen)
        best = best.before
    return chosen[::-1]


def _extended(partials: Sequence[_Partial | None], choices: Sequence[Choice], room: int) -> list[_Partial | None]:
    """Returns the partial choices with each of one more item's, by size, without those that another one beats."""
    found = [
        _Partial(size, (0.0 if partial is None else partial.cost) + choice.cost, number, partial)
        for partial in partials
        for number, choice in enumerate(choices)
        if (size := (0 if partial is None else partial.size) + choice.size) <= room
    ]
    found.sort(key=lambda partial: (partial.size, partial.cost))
    kept: list[_Partial | None] = []
    least = math.inf
    for partial in found:
        if partial.cost < least:
            least = partial.cost
            kept.append(partial)
    return kept
