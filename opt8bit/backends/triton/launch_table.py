"""Cuts the tensors of a batch into tiles, and writes the table that the kernels read of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[numpy.int64]

TILE = 1024  # elements of a program, or one block where that is longer; a block of states that are not coded
ELEMENTS_PER_WARP = 256  # 8 of a thread
MAX_WARPS = 16
SPARE_BUFFERS = 4  # for graphs


class Shape(NamedTuple):
    """Describes a tile: tensors that are cut alike go into one launch."""

    block: int  # elements that a block has room for, a power of two
    is_aligned: bool

    @property
    def blocks(self) -> int:
        return max(TILE // self.block, 1)

    @property
    def warps(self) -> int:
        return min(max(self.blocks * self.block // ELEMENTS_PER_WARP, 1), MAX_WARPS)


class Launch(NamedTuple):
    """A kernel on a part of the tiles."""

    shape: Shape
    first_tile: int
    tiles: int


class Cut(NamedTuple):
    """Says how tensors are cut into tiles."""

    launches: list[Launch]
    places: NDArray[numpy.int64]  # (n, 2): of each tensor the first tile, and how many
    tiles: Tensor  # (tiles,), int32: the tensor of each
    squares: Tensor | None  # (tiles, 2), float64: for the norms, if the rule asks for some


class Table:
    """The kernels' table on the device, and what it holds.

    Args:
        words: of 64 bits.
        device: that reads it.
        capturable: whether CUDA graphs may be captured.
    """

    def __init__(self, words: int, device: torch.device, capturable: bool) -> None:
        self.on_device = torch.zeros(words, dtype=torch.int64, device=device)
        self._held: Words | None = None
        self._is_pinned = device.type != "cpu"
        self._capturable = capturable and device.type == "cuda"
        self._spare: list[Tensor] = []  # pinned memory cannot be had while a graph is captured
        self._of_graphs: list[tuple[Tensor, Tensor]] = []
        self._refill()

    def holding(self, words: Words) -> Tensor:
        """Returns the table with these words, on the current stream; nothing is copied that it holds already.

        Raises:
            RuntimeError: more graphs were captured, without a step between them, than there are spare buffers.
        """
        if self._capturable and torch.cuda.is_current_stream_capturing():
            return self._of_graph(words)
        self._refill()
        if self._held is None or not numpy.array_equal(words, self._held):
            source = torch.from_numpy(words)
            # Torch gives pinned memory to others only when the copy out of it is done.
            self.on_device.copy_(source.pin_memory() if self._is_pinned else source, non_blocking=True)
            self._held = words
        return self.on_device

    def _of_graph(self, words: Words) -> Tensor:
        """Returns a table of the graph's own. The copy is a part of it, and repeated whenever it is replayed."""
        if not self._spare:
            raise RuntimeError(f"{SPARE_BUFFERS} steps were captured in graphs without one between them: take one")
        pinned, table = self._spare.pop(), torch.empty_like(self.on_device)
        pinned.copy_(torch.from_numpy(words))
        self._of_graphs.append((pinned, table))
        return table.copy_(pinned, non_blocking=True)

    def _refill(self) -> None:
        while self._capturable and len(self._spare) < SPARE_BUFFERS:
            self._spare.append(torch.empty(self.on_device.shape, dtype=torch.int64, device="cpu", pin_memory=True))
