"""Decides how the layers of a packed checkpoint are stored in another layout, and which of them cannot be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from opt8bit.ptq.conversion.codes import Kind, codes_of, is_packed, kind_of
from opt8bit.ptq.export import check_format
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model.blocks import block_layers, matrix
from opt8bit.ptq.model.source import Checkpoint
from opt8bit.ptq.plan import LayerPlan, Plan
from opt8bit.ptq.rounding import RTN
from opt8bit.quant.grid import SCALE_DTYPES
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import WeightScheme
from opt8bit.recipe.recipe import Recipe
from opt8bit.recipe.registry import FORMATS

WHOLE = math.inf
SMALLER = (128, 64, 32)  # group sizes that larger groups are cut into, where a format does not have theirs
ORDER = "the inputs of a group do not follow one another, which no layout that is written here has a place for"
BEYOND = "a zero point is larger than the largest code, which only the first version of GPTQ's layout stores"
ZERO_POINTS = "its zero points are not all in the middle, and {format} holds symmetric grids"
SCALES = "{format} has scales of {dtype}, which does not hold those that are stored"
OUTSIDE = "{format} stores embeddings and head in few bits, which they were not rounded to"


@dataclass
class Target:
    """Says what becomes of the packed layers of a source.

    Attributes:
        kinds: how the source has them, by the name of the layer in the model.
        plan: how the format gets them.
        again: those that are not carried over as they are, and why; "" stands for what is outside of the blocks.
        refitted: those of them whose grids are fitted again.
    """

    kinds: Mapping[str, Kind]
    plan: Plan
    again: dict[str, str] = field(default_factory=dict)
    refitted: list[str] = field(default_factory=list)

    @property
    def schemes(self) -> dict[str, WeightScheme]:
        """The scheme of each layer that is written packed, by its name."""
        return {name: own.scheme for name, own in self.plan.layers.items() if own is not None}

    @property
    def report(self) -> list[LayerReport]:
        """A row a layer, with the bits that its codes and scales take, and no errors, which are not known."""
        bits = {name: kind.bits_per_weight for name, kind in self.kinds.items()}
        for name, scheme in self.schemes.items():
            grid, size = scheme.grid, scheme.group_size or self.kinds[name].shape[1]
            assert isinstance(grid, UniformGrid)
            bits[name] = grid.bits + (8 * grid.scale_dtype.itemsize + (0 if grid.symmetric else grid.bits)) / size
        unknown = (math.nan, math.nan, 0.0, 0, None, None, "", 0.0)
        return [LayerReport(name, kind.shape, bits[name], *unknown) for name, kind in self.kinds.items()]


def target_of(source: Checkpoint, format: str) -> Target:
    """Decides how each layer is stored.

    Args:
        source: with packed weights, read as what they stand for.
        format: a name of :data:`FORMATS`.

    Raises:
        ValueError: no layer of the blocks is packed, or the format cannot hold what is, with any rounding. The message
            names the layer.
    """
    stored = packed_layers(source)
    kinds = {name: kind_of(codes_of(source.files, there), frozenset(SCALE_DTYPES)) for name, there in stored.items()}
    layers = block_layers(source.model)
    if not FORMATS[format].is_packed:
        plan = _plan(dict.fromkeys(layers))
        check_format(format, source, plan)
        return Target(kinds, plan)
    if not kinds:
        raise ValueError("no linear layer of the model's blocks is packed")
    _refuse_outside(source, format, set(stored.values()))
    target = Target(kinds, _plan({}))
    for name, kind in kinds.items():
        _decide(target, name, kind, source, format)
    if FORMATS[format].outside is not None:
        target.again[""] = OUTSIDE.format(format=format)
    target.plan = _held(source, format, kinds)
    return target


def packed_layers(source: Checkpoint) -> dict[str, str]:
    """Returns the checkpoint's name of each packed weight of the blocks, by the name of its layer in the model."""
    found = {name: source.stored_name(f"{name}.weight") for name in block_layers(source.model)}
    return {name: there for name, there in found.items() if there is not None and is_packed(source.files, there)}


def _decide(target: Target, name: str, kind: Kind, source: Checkpoint, format: str) -> None:
    """Notes why a layer cannot be carried over as it is, if it cannot.

    Raises:
        ValueError: its groups are not equally large.
    """
    if kind.shape[1] % kind.group_size:
        raise ValueError(f"{name}: groups of {kind.group_size} do not divide its {kind.shape[1]} inputs")
    dtype = _scale_dtype(source, format, name)
    if not kind.is_ordered:
        target.again[name] = ORDER
    elif FORMATS[format].is_symmetric and not kind.is_symmetric:
        target.again[name] = ZERO_POINTS.format(format=format)
    elif not kind.has_codes_of_zero:
        target.again[name] = BEYOND
    elif dtype not in kind.held_in:
        target.again[name] = SCALES.format(format=format, dtype=str(dtype).removeprefix("torch."))
        return
    if name in target.again:
        target.refitted.append(name)


def _held(source: Checkpoint, format: str, kinds: Mapping[str, Kind]) -> Plan:
    """Returns the plan with the largest groups that the format holds.

    Raises:
        ValueError: it holds none.
    """
    symmetric = FORMATS[format].is_symmetric or all(kind.is_symmetric for kind in kinds.values())
    are_rows = all(kind.group_size == kind.shape[1] for kind in kinds.values())
    first: ValueError | None = None
    for most in (*([None] if are_rows else []), WHOLE, *SMALLER):
        layers: dict[str, LayerPlan | None] = dict.fromkeys(block_layers(source.model))
        for name, kind in kinds.items():
            grid = UniformGrid(kind.bits, symmetric=symmetric, scale_dtype=_scale_dtype(source, format, name))
            layers[name] = LayerPlan(RTN(), WeightScheme(grid, _group_size(kind, most)))
        try:
            check_format(format, source, _plan(layers))
        except ValueError as error:
            first = first or error
            continue
        return _plan(layers)
    assert first is not None
    raise first


def _group_size(kind: Kind, most: float | None) -> int | None:
    """Returns the group size of a layer, cut to ``most`` where that divides it; None, for whole rows, without that."""
    if most is None:
        return None
    return int(most) if kind.group_size > most and kind.group_size % most == 0 else kind.group_size


def _scale_dtype(source: Checkpoint, format: str, layer: str) -> torch.dtype:
    return FORMATS[format].scale_dtype or matrix(source.model.get_submodule(layer)).dtype


def _plan(layers: Mapping[str, LayerPlan | None]) -> Plan:
    return Plan(Recipe(), layers, 0.0)


def _refuse_outside(source: Checkpoint, format: str, inside: set[str]) -> None:
    """
    Raises:
        ValueError: a weight outside of the blocks is packed.
    """
    for name in sorted(source.files.where.keys() - inside):
        if is_packed(source.files, name):
            raise ValueError(
                f"{name} is packed and outside of the model's blocks, where {format} has no codes: use format 'dense'"
            )
