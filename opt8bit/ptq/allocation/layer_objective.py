"""Bits for layers by what each width was seen to do to their outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opt8bit.ptq.allocation.knapsack import Choice, allocate
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.recipe.arguments import check_positive


def allocate_bits(
    reports: Mapping[int, Sequence[LayerReport]], bits_per_weight: float, together: Sequence[Sequence[str]] = ()
) -> dict[str, dict[str, Any]]:
    """Chooses a width for each layer, so that the sum of the layers' relative output errors is least under a budget.

    Run :func:`compress` once for each width, and once more with the overrides that this returns::

        reports = {bits: ptq.compress(model, ids, bits=bits).report for bits in (3, 4)}
        result = ptq.compress(model, ids, bits=3, overrides=allocate_bits(reports, 3.7))

    Args:
        reports: on the same layers, by the width they were all rounded to.
        bits_per_weight: of all layers together, everything stored counted, at most, up to half a bit of all. So what a
            result says of its ``bits_per_weight`` is enough for the same result.
        together: names of layers that servers put into one matrix, such as queries, keys and values: they get one
            width.

    Returns:
        Overrides for :func:`compress`, one for each layer.

    Raises:
        TypeError: the reports are no mapping, a width is not an integer, or ``together`` has no lists of names.
        ValueError: there are no reports, they are not on the same layers, an error in one is not finite, ``together``
            names a layer that has no report or is named twice, or the budget is not a positive number or below what the
            smallest width takes.
    """
    _check(reports, bits_per_weight, together)
    widths = sorted(reports)
    rows = {bits: {row.name: row for row in reports[bits]} for bits in widths}
    names = [row.name for row in reports[widths[0]]]
    for bits in widths:
        if rows[bits].keys() != set(names):
            odd = sorted(rows[bits].keys() ^ set(names))
            raise ValueError(f"the reports at {widths[0]} and {bits} bits are not on the same layers: {odd[0]}")
    groups = _groups(names, together)
    items = [[_choice([rows[bits][name] for name in group]) for bits in widths] for group in groups]
    weights = sum(row.weights for row in reports[widths[0]])
    chosen = allocate(items, math.floor(bits_per_weight * weights + 0.5))
    return {name: {"bits": widths[number]} for group, number in zip(groups, chosen, strict=True) for name in group}


def _check(
    reports: Mapping[int, Sequence[LayerReport]], bits_per_weight: float, together: Sequence[Sequence[str]]
) -> None:
    """
    Raises:
        TypeError, ValueError: an argument cannot be one.
    """
    check_positive("bits_per_weight", bits_per_weight)
    if not isinstance(reports, Mapping):
        raise TypeError(f"reports must be a mapping from widths to reports, got {reports!r}")
    if not reports or not all(reports.values()):
        raise ValueError(f"reports must have a report for each width, got {dict(reports)!r}")
    for bits, report in reports.items():
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"reports must be by the width, an integer, got {bits!r}")
        for row in report:
            if not math.isfinite(row.error_corrected):
                raise ValueError(f"{row.name}: its error at {bits} bits must be finite, got {row.error_corrected}")
    if isinstance(together, str) or any(isinstance(group, str) for group in together):
        raise TypeError(f"together must have lists of names, such as [['a', 'b']], got {together!r}")


def _groups(names: Sequence[str], together: Sequence[Sequence[str]]) -> list[list[str]]:
    listed = [name for group in together for name in group]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(f"together names {twice[0]} twice")
    of = {name: list(group) for group in together for name in group}
    unknown = sorted(of.keys() - set(names))
    if unknown:
        raise ValueError(f"together names {unknown[0]}, on which there is no report")
    found: list[list[str]] = []
    for name in names:
        group = of.get(name, [name])
        if group not in found:
            found.append(group)
    return found


def _choice(rows: Sequence[LayerReport]) -> Choice:
    return Choice(sum(row.stored_bits for row in rows), sum(row.error_corrected for row in rows))
