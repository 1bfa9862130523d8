"""Bits for layers by what each width was seen to do to their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opt8bit.ptq.allocation.knapsack import Choice, allocate
from opt8bit.ptq.layer_report import LayerReport


def allocate_bits(
    reports: Mapping[int, Sequence[LayerReport]], bits_per_weight: float, together: Sequence[Sequence[str]] = ()
) -> dict[str, dict[str, Any]]:
    """Chooses a width for each layer, so that the sum of the layers' relative output errors is least under a budget.

    Run :func:`compress` once for each width, and once more with the overrides that this returns::

        reports = {bits: ptq.compress(model, ids, bits=bits).report for bits in (3, 4)}
        result = ptq.compress(model, ids, bits=3, overrides=allocate_bits(reports, 3.7))

    Args:
        reports: on the same layers, by the width they were all rounded to.
        bits_per_weight: of all layers together, everything stored counted, at most.
        together: names of layers that servers put into one matrix, such as queries, keys and values: they get one
            width.

    Returns:
        Overrides for :func:`compress`, one for each layer.

    Raises:
        ValueError: the reports are not on the same layers, ``together`` names one that has no report or is named twice,
            or the budget is below what the smallest width takes.
    """
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
    chosen = allocate(items, int(bits_per_weight * weights))
    return {name: {"bits": widths[number]} for group, number in zip(groups, chosen, strict=True) for name in group}


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
