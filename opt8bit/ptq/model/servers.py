"""Says, in sentences, what of a packed checkpoint its runtimes do not run, and what to do about it.

What each runtime runs is in :mod:`opt8bit.recipe.runtimes`. The tables here were read in the same versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from opt8bit.backends import first_of
from opt8bit.ptq.model.blocks import by_pattern
from opt8bit.recipe.runtimes import SERVERS, Runs, Runtime

NAMED = 4  # patterns of layers in one warning
SKIP = 'an override in a recipe with "skip": true'
# Layers that servers put into one matrix, which has one scheme.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\..+")  # a layer of one expert; all experts have one scheme
ROUTER = re.compile(r".*\.(gate|router|shared_expert_gate)(\.(layer|proj|classifier))?")  # held unpacked beside experts


class Packing(NamedTuple):
    """Says how a weight is packed, as far as servers tell weights apart: by the name of its grid, or as integers."""

    bits: int
    symmetric: bool
    group_size: int | None
    grid: str | None = None

    def __str__(self) -> str:
        if self.grid is not None:
            return f"the grid {self.grid}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, {kind}, {f'groups of {self.group_size}' if self.group_size else 'whole rows'}"


class Layer(NamedTuple):
    """A linear layer of a checkpoint that is to be written: its weight's shape (out, in), and its packing, if any."""

    shape: tuple[int, int]
    packing: Packing | None


def warnings_of(
    format: str,
    layers: Mapping[str, Layer],
    prefix: str,
    blocks: int,
    *,
    has_experts: bool,
    runtimes: Sequence[Runtime] = SERVERS,
) -> list[str]:
    """Returns what runtimes refuse, or get wrong, of a checkpoint that is to be written, and what to do about it.

    Args:
        format: of the checkpoint.
        layers: the linear layers of the blocks, by name.
        prefix: the name of the list of blocks.
        blocks: how many there are.
        has_experts: whether blocks have experts, as linear layers or as one tensor.
        runtimes: that are meant to run it.
    """
    if not any(format in runtime.formats for runtime in runtimes):
        return []

    def named(names: Iterable[str]) -> str:
        found = [
            f"{pattern} {shape}" for pattern, shape in by_pattern({n: _shape(layers[n]) for n in names}, prefix, blocks)
        ]
        return first_of(found, NAMED)

    packed = {name: layer for name, layer in layers.items() if layer.packing is not None}
    found = []
    for runtime in runtimes:
        if format in runtime.formats:
            found += _not_run(runtime.title, runtime.formats[format], packed, named)
    fusing = [runtime.title for runtime in runtimes if runtime.fuses]
    return found + (_unlike_or_router(fusing, layers, named, has_experts) if fusing else [])


def _unlike_or_router(
    titles: Sequence[str], layers: Mapping[str, Layer], named: Callable[[Iterable[str]], str], has_experts: bool
) -> list[str]:
    """Returns what runtimes that fuse layers get wrong of how neighbouring layers are packed."""
    found, who, s = [], " and ".join(titles), "" if len(titles) > 1 else "s"
    unlike = _unlike(layers)
    if unlike:
        found.append(
            f"{who} put{s} these into one matrix, and refuse{s} them, or get{s} them wrong, where they are not "
            f"packed alike: {named(unlike)}: give them the same bits, grids and group size, or leave all of them as "
            "they are, or use format 'dense'"
        )
    routers = [name for name, layer in layers.items() if layer.packing and has_experts and ROUTER.fullmatch(name)]
    if routers:
        found.append(f"{who} look{s} for unpacked routers: leave {named(routers)} as they are, by {SKIP}")
    return found


def who_skips(model_type: str | None, layer: str, runtimes: Sequence[Runtime] = SERVERS) -> str | None:
    """Returns a sentence on the runtimes that do not use a layer's bias, or refuse it, or None if all of them use it.

    Args:
        model_type: as the written configuration has it.
        layer: its own name, the last part of the whole.
        runtimes: that are meant to run it.
    """
    unused = [each.title for each in runtimes if _names(each.unused_biases, model_type, layer)]
    refusing = [each.title for each in runtimes if _names(each.refused_biases, model_type, layer)]
    if refusing:
        return f"{' and '.join(refusing)} does not load all biases that come with this one"
    return f"{' and '.join(unused)} loads this bias and does not use it" if unused else None


def _names(biases: Iterable[tuple[str, str]], model_type: str | None, layer: str) -> bool:
    return any(kind == model_type and re.fullmatch(own, layer) for kind, own in biases)


def _shape(layer: Layer) -> str:
    return "({} × {})".format(*layer.shape)


def _not_run(
    title: str, runs: Runs, layers: Mapping[str, Layer], named: Callable[[Iterable[str]], str]
) -> Iterator[str]:
    by_packing: dict[Packing, list[str]] = {}
    for name, layer in layers.items():
        if layer.packing is not None and _remedies(runs, layer.packing):
            by_packing.setdefault(layer.packing, []).append(name)
    for packing, names in by_packing.items():
        where = "" if len(names) == len(layers) else f" ({named(names)})"
        todo = " and ".join(_remedies(runs, packing))
        yield f"{title} {runs.otherwise} {packing}{where}: use {todo}, or format 'dense'"
    odd = _odd_shapes(layers, runs.multiple)
    if odd:
        yield (
            f"{title} {runs.otherwise} weights whose inputs or outputs are no multiple of {runs.multiple}: "
            f"{named(odd)}: leave them as they are, by {SKIP}, or use format 'dense'"
        )


def _remedies(runs: Runs, packing: Packing) -> list[str]:
    """Returns what to ask for so that a runtime runs a packing; nothing where it does."""
    if packing.grid is not None:
        instead = ["integers", *(f"grid {name!r}" for name in runs.grids)]
        return [] if packing.grid in runs.grids else [" or ".join(instead)]
    found = []
    if packing.bits not in (runs.symmetric if packing.symmetric else runs.asymmetric):
        has_width = packing.bits in runs.symmetric
        grids = "" if runs.symmetric == runs.asymmetric else ", symmetric"
        found.append("symmetric grids" if has_width else f"{_or(runs.symmetric)} bits{grids}")
    if runs.group_sizes is not None and packing.group_size not in runs.group_sizes:
        found.append(f"groups of {_or(size for size in runs.group_sizes if size)} or whole rows")
    return found


def _or(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _odd_shapes(layers: Mapping[str, Layer], multiple: int) -> list[str]:
    """Returns the layers whose inputs, or whose outputs together with those of fused ones, are no multiple."""
    outputs = {name: sum(layers[each].shape[0] for each in _fused(name) if each in layers) for name in layers}
    return [name for name, layer in layers.items() if layer.shape[1] % multiple or outputs[name] % multiple]


def _fused(name: str) -> list[str]:
    """Returns the names of the layers that share one matrix in a server, this one among them."""
    parent, _, own = name.rpartition(".")
    return [f"{parent}.{each}" for each in next((names for names in FUSED if own in names), (own,))]


def _unlike(layers: Mapping[str, Layer]) -> list[str]:
    """Returns the layers that a server puts together, though they are not packed alike."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(_fused(name)[0], []).append(name)
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            groups.setdefault(expert["experts"], []).append(name)
    unlike = [names for names in groups.values() if len({layers[name].packing for name in names}) > 1]
    return list(dict.fromkeys(name for names in unlike for name in names))
