"""The grids of the types of blocks in GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from opt8bit.quant.affine import AffineGrid
from opt8bit.quant.codebook_grid import CodebookGrid
from opt8bit.quant.described import described
from opt8bit.quant.grid import RANGES, Grid
from opt8bit.quant.superblocks import SuperblockGrid
from opt8bit.quant.uniform import RESTRICTED, UniformGrid, is_uniform
from opt8bit.quant.weight import WeightScheme
from opt8bit.recipe.gguf_types import GGUF_TYPES

# The values of IQ4_NL, kvalues_iq4nl of ggml-common.h.
NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _symmetric(bits: int, range: str) -> Grid:
    return UniformGrid(bits, symmetric=True, range=range, scale_dtype=torch.float16)


def _affine(bits: int, range: str) -> Grid:
    return AffineGrid(bits, range=range, scale_dtype=torch.float16)


def _non_linear(range: str) -> Grid:
    values = torch.tensor(NON_LINEAR, dtype=torch.float32, device="cpu")
    return CodebookGrid(values, range=range, signed=True, scale_dtype=torch.float16)


def _superblocks(bits: int, sub_bits: int, range: str, *, together: int, centred: bool = False) -> Grid:
    return SuperblockGrid(bits, together=together, sub_bits=sub_bits, centred=centred, range=range)


_GRIDS: Mapping[str, Callable[[str], Grid]] = {  # by type, of a range
    "Q4_0": lambda range: _symmetric(4, range),
    "Q4_1": lambda range: _affine(4, range),
    "Q5_0": lambda range: _symmetric(5, range),
    "Q5_1": lambda range: _affine(5, range),
    "Q8_0": lambda range: _symmetric(8, range),
    "IQ4_NL": _non_linear,
    "Q2_K": lambda range: _superblocks(2, 4, range, together=16),
    "Q3_K": lambda range: _superblocks(3, 6, range, together=16, centred=True),
    "Q4_K": lambda range: _superblocks(4, 6, range, together=8),
    "Q5_K": lambda range: _superblocks(5, 6, range, together=8),
    "Q6_K": lambda range: _superblocks(6, 8, range, together=16, centred=True),
}


def scheme_of_type(kind: str, range: str) -> WeightScheme:
    """Returns the scheme of weights that are stored as a type, one of :data:`GGUF_TYPES`."""
    return WeightScheme(_GRIDS[kind](range), GGUF_TYPES[kind].group_size)


def type_of(scheme: WeightScheme) -> str | None:
    """Returns the type that stores weights of a scheme, or None where there is none."""
    grid = scheme.grid
    if is_uniform(grid) and grid.symmetric == RESTRICTED:  # stored alike
        scheme = replace(scheme, grid=_symmetric(grid.bits, grid.range))
    for kind in GGUF_TYPES:
        if any(described(scheme) == described(scheme_of_type(kind, range)) for range in RANGES):
            return kind
    return None
