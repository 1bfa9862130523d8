"""Experts that are linear layers of their own: each sees the tokens that are routed to it, in some passes none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from opt8bit.ptq.model.usage import Use

Family = dict[str, tuple[int, str]]  # the number of the expert and the layer's name in it, by the layer's name


def expert_families(block: nn.Module, usage: Mapping[str, Use], tokens: int) -> list[Family]:
    """Returns the layers of each list of experts in a block.

    A list of modules has experts if a pass calls some of its members with fewer tokens than there are, or calls some
    and leaves out others that are built alike.
    """
    found: dict[str, Family] = {}
    for name in usage:
        for prefix, number, own in _places(name):
            if isinstance(block.get_submodule(prefix), nn.ModuleList):
                found.setdefault(prefix, {})[name] = (number, own)
                break
    return [family for family in found.values() if _are_routed(block, family, usage, tokens)]


def _places(name: str) -> Iterator[tuple[str, int, str]]:
    """Yields the ways to read a layer's name as that of a list, a number in it, and the layer's own name there."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if i and part.isdecimal():
            yield ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])


def _are_routed(block: nn.Module, family: Family, usage: Mapping[str, Use], tokens: int) -> bool:
    members: dict[str, list[str]] = {}
    for name, (_, own) in family.items():
        members.setdefault(own, []).append(name)
    for names in members.values():
        called = [name for name in names if usage[name].calls == 1 and usage[name].returns_tensor]
        alike = len({block.get_parameter(f"{name}.weight").shape for name in names}) == 1
        if len(called) == sum(usage[name].calls > 0 for name in names) and len(names) > 1 and called and alike:
            fewer = any(usage[name].rows < tokens for name in called)
            if fewer or len(called) < len(names):
                return True
    return False


def with_experts(stages: Sequence[Sequence[str]], families: Sequence[Family]) -> list[list[str]]:
    """Puts the stages of all experts in the order of their numbers, where the first that was called stood.

    What one expert does with its layers, all of its list do: so those have stages that the pass did not call.
    """
    result = [list(names) for names in stages]
    for family in families:
        where = [i for i, names in enumerate(result) if names[0] in family]
        called: dict[int, list[list[str]]] = {}
        for i in where:
            number = family[result[i][0]][0]
            called.setdefault(number, []).append([family[name][1] for name in result[i] if name in family])
        pattern = max(called.values(), key=lambda found: sum(map(len, found)))
        names = {place: name for name, place in family.items()}
        numbers = sorted({number for number, _ in family.values()})
        expanded = [
            [names[number, own] for own in owns if (number, own) in names] for number in numbers for owns in pattern
        ]
        before, behind = result[: where[0]], result[where[0] :]
        result = [*before, *filter(None, expanded), *(names for names in behind if names[0] not in family)]
    return result
