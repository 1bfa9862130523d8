"""Reads the codes of a packed checkpoint as weights that a format can write."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.model.checkpoint_files import CheckpointFiles, opened
from opt8bit.ptq.model.packed.checkpoint import Packed
from opt8bit.ptq.model.packed.layout import Unpacked, dequantized, groups_of_columns
from opt8bit.ptq.result import Change
from opt8bit.ptq.rounding import RTN
from opt8bit.quant.uniform import UniformParams
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme


def is_packed(files: CheckpointFiles, weight: str) -> bool:
    """Tells whether a checkpoint has a weight as codes."""
    return files.coded is not None and files.coded.parts(weight) != (weight,)


def codes_of(files: CheckpointFiles, weight: str) -> Unpacked:
    """Reads a packed weight.

    Args:
        files: of the checkpoint, to be unpacked.
        weight: its name.

    Raises:
        ValueError: it cannot be unpacked; the message names the layer.
    """
    assert isinstance(files.coded, Packed)
    tensors = {}
    for part in files.coded.parts(weight):
        with opened(files.stored[part]) as file:
            tensors[part] = file.get_tensor(part).clone()
    return files.coded.unpacked(weight, tensors)


@dataclass(frozen=True)
class Kind:
    """Says how the weight of a layer is stored.

    Attributes:
        shape: (out, in).
        bits: of a code.
        group_size: inputs that share a scale.
        is_symmetric: whether all zero points are in the middle.
        has_codes_of_zero: whether every zero point is a code; GPTQ's first version also has one more than the largest.
        is_ordered: whether the inputs of each group follow one another.
        scale_dtype: that the scales are stored in.
        held_in: the dtypes that hold all scales.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    is_symmetric: bool
    has_codes_of_zero: bool
    is_ordered: bool
    scale_dtype: torch.dtype
    held_in: frozenset[torch.dtype]

    @property
    def bits_per_weight(self) -> float:
        zero_point = 0 if self.is_symmetric else self.bits
        return self.bits + (8 * self.scale_dtype.itemsize + zero_point) / self.group_size


def kind_of(codes: Unpacked, dtypes: frozenset[torch.dtype]) -> Kind:
    """Returns how a weight is stored; ``dtypes`` are those that may hold its scales."""
    outputs, columns = codes.codes.shape
    groups, bits = codes.scale.shape[1], codes.bits
    assert bits is not None
    scale = codes.scale.to(torch.float32)
    return Kind(
        shape=(outputs, columns),
        bits=bits,
        group_size=-(-columns // groups),
        is_symmetric=bool((codes.zero_point == 2 ** (bits - 1)).all()),
        has_codes_of_zero=bool(((codes.zero_point >= 0) & (codes.zero_point < 2**bits)).all()),
        is_ordered=columns % groups == 0 and torch.equal(codes.group.long(), groups_of_columns(columns, groups)),
        scale_dtype=codes.scale.dtype,
        held_in=frozenset(dtype for dtype in dtypes if torch.equal(scale.to(dtype).to(torch.float32), scale)),
    )


class Carried(Mapping[str, Change]):
    """The weights of a source's packed layers on the grids of a target, each read when it is asked for.

    Args:
        files: of the source.
        stored: the source's name of each weight, by that of the model's parameter.
        schemes: of the target, by the name of the model's parameter.
        again: names of those parameters that are not carried over as they are.
        refitted: those of them that get scales and codes of their own; of the others only scales are rounded.
        others: weights that are there, by the name of the model's parameter.

    Attributes:
        errors: of those that were rounded again, squared, relative to the square of the weight before.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        stored: Mapping[str, str],
        schemes: Mapping[str, WeightScheme],
        again: Collection[str],
        refitted: Collection[str],
        others: Mapping[str, Change],
    ) -> None:
        self._files, self._stored, self._schemes, self._others = files, stored, schemes, others
        self._again, self._refitted = again, refitted
        self.errors: dict[str, float] = {}

    def __getitem__(self, name: str) -> Change:
        if name in self._others:
            return self._others[name]
        codes, scheme = codes_of(self._files, self._stored[name]), self._schemes[name]
        if name not in self._again:
            return _carried(codes, scheme)
        weight = dequantized(codes.codes, codes.scale, codes.zero_point, codes.group)
        if name in self._refitted:
            rounded = RTN().round(weight, InputStatistics(), scheme)
        else:
            rounded = _carried(codes, scheme)
        self.errors[name] = relative_error(rounded, weight)
        return rounded

    def __iter__(self) -> Iterator[str]:
        return iter((*self._schemes, *self._others))

    def __len__(self) -> int:
        return len(self._schemes) + len(self._others)


def relative_error(
    rounded: QuantizedWeight,
    weight: Tensor,  # (out, in)
) -> float:
    """Returns the squared error of a weight, relative to its own square."""
    weight = weight.to(torch.float32)
    return float((rounded.dequantize() - weight).square().sum() / weight.square().sum())


def _carried(codes: Unpacked, scheme: WeightScheme) -> QuantizedWeight:
    """Returns the same codes, with scales in the scheme's dtype.

    Where the scheme has smaller groups, each has the scale of the one that it is a part of.
    """
    outputs, columns = codes.codes.shape
    groups = columns // (scheme.group_size or columns)
    repeats = groups // codes.scale.shape[1]

    def per_group(stored: Tensor) -> Tensor:
        return stored.to(scheme.grid.scale_dtype).to(torch.float32).repeat_interleave(repeats, dim=1)

    params = UniformParams(per_group(codes.scale), per_group(codes.zero_point))
    return QuantizedWeight((outputs, columns), (Part(scheme.grid, codes.codes, params),))
