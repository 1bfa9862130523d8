"""What is kept of a batch of parameters between steps, and how a step of it is launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from opt8bit.backends.interface import Batch, GroupUpdate
from opt8bit.backends.triton import codebook
from opt8bit.backends.triton import optimizer_step as kernels
from opt8bit.backends.triton.update_rules import RULES

Words = NDArray[numpy.int64]

TILE = 2048  # elements of a program, or one block where that is longer
ELEMENTS_PER_WARP = 512  # 16 of a thread
FULL_BLOCK = 1024  # elements that are taken together of a state which is not coded
ALIGNMENT = 16  # bytes of an address, and elements of a row and of a block, where loads are 16 bytes wide
OPTIONS = {"enable_fp_fusion": False}  # so that results round as the reference's do
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Shape(NamedTuple):
    """Of a tile: tensors that are cut alike go into one launch."""

    block: int  # elements that a block has room for, a power of two
    is_aligned: bool

    @property
    def blocks(self) -> int:
        return max(TILE // self.block, 1)

    @property
    def warps(self) -> int:
        return max(self.blocks * self.block // ELEMENTS_PER_WARP, 1)


class Launch(NamedTuple):
    """A kernel on a part of the tiles."""

    shape: Shape
    first_tile: int
    tiles: int


class Launches:
    """The launches of a batch, and what they read and write beside the tensors.

    Args:
        batch: of a rule that has kernels.
        device: of its parameters.

    Raises:
        RuntimeError: a kernel does not compile. The message names the rule, the dtype and the device.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.device = device
        self._batch = batch
        self._functions = RULES[batch.rule.name]
        self._rows = _rows(batch)
        self._launches: list[Launch] = []
        self._tiles = self._squares = torch.empty(0)
        self._aligned = numpy.zeros(0, numpy.bool_)
        count = len(self._rows)
        self._constants = torch.zeros(count, kernels.MAX_CONSTANTS.value, device=device)
        self._keys = torch.zeros(count, dtype=torch.int64, device=device)
        self._table = Table(kernels.HEAD.value + self._rows.size, device, batch.capturable)
        pairs = list(zip(batch.codebooks, batch.rule.states.values(), strict=True))
        tables = [codebook.tables(values, signed) for values, signed in pairs]
        between = [codebook.midpoints(values) for values, _ in pairs]
        self._maps = torch.cat([*tables, torch.zeros(1)]).to(device)  # with one more, as a rule may have no states
        self._midpoints = torch.cat([*between, torch.zeros(1, dtype=torch.float64)]).to(device)
        self._cut(numpy.ones(count, numpy.bool_))
        self._compile()

    def step(self, group: GroupUpdate) -> None:
        """Takes the step of the batch, on the current stream."""
        aligned = (group.addresses[:, _wide_columns(self._batch)] % ALIGNMENT == 0).all(1)
        if not numpy.array_equal(aligned, self._aligned):
            self._cut(aligned)
        lr, grad_scale, found_inf = (
            value.to(self.device) if isinstance(value, Tensor) else None
            for value in (group.hyper["lr"], group.grad_scale, group.found_inf)
        )
        self._run(self._table.holding(self._words(group)), lr, grad_scale, found_inf, _launch)

    def _run(self, table: Tensor, lr: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None, run: Any):
        rule, functions, count = self._batch.rule, self._functions, len(self._rows)
        constants = (table, self._constants, self._keys, self._squares, lr, found_inf, functions.constants)
        hyper = len(rule.hyper)
        run(kernels.constants_kernel, count, 1, *constants, hyper, False)
        if functions.measure is not None:
            for launch in self._launches:
                arguments = (table, self._tiles, launch.first_tile, self._constants, self._squares, self._maps)
                run_on = (kernels.measure_kernel, launch.tiles, launch.shape.warps)
                run(*run_on, *arguments, grad_scale, functions.measure, *self._constexprs(launch.shape))
            run(kernels.constants_kernel, count, 1, *constants, hyper, True)
        for launch in self._launches:
            arguments = (table, self._tiles, launch.first_tile, self._constants, self._keys, self._maps)
            run_on = (kernels.step_kernel, launch.tiles, launch.shape.warps)
            last = (self._midpoints, grad_scale, found_inf, functions.update)
            run(*run_on, *arguments, *last, *self._constexprs(launch.shape))

    def _constexprs(self, shape: Shape) -> tuple[Any, ...]:
        batch = self._batch
        rounding = batch.rounding if batch.dtype == torch.bfloat16 else "nearest"
        signed = tuple(batch.rule.states.values())
        return self._functions.count, signed, batch.coded, rounding, TYPES[batch.dtype], shape.blocks, shape.block, shape.is_aligned

    def _compile(self) -> None:
        """Compiles every kernel before one runs, as a step that fails half-way would have been half taken."""
        try:
            self._run(self._table.device, None, None, None, _warm_up)
        except Exception as error:  # of many kinds: the front end's, LLVM's, the driver's
            batch = self._batch
            raise RuntimeError(
                f"the Triton kernels of {batch.rule.name} for {batch.dtype} do not compile for {self.device}: {error}"
            ) from error

    def _cut(self, aligned: NDArray[numpy.bool_]) -> None:
        """Cuts the tensors into tiles; ``aligned`` says whose addresses are multiples of 16."""
        rows, first = self._rows, 0
        shapes = [_shape(row, bool(is_aligned)) for row, is_aligned in zip(rows, aligned, strict=True)]
        tensors, self._launches = [], []
        for shape in sorted(set(shapes)):
            chosen = [other == shape and row[kernels.BLOCKS.value] > 0 for other, row in zip(shapes, rows, strict=True)]
            members = numpy.flatnonzero(chosen)
            counts = -(-rows[members, kernels.BLOCKS.value] // shape.blocks)
            rows[members, kernels.TILES.value] = counts
            rows[members, kernels.FIRST_TILE.value] = first + numpy.cumsum(counts) - counts
            tensors.append(numpy.repeat(members, counts).astype(numpy.int32))
            if len(members):
                self._launches.append(Launch(shape, first, int(counts.sum())))
            first += int(counts.sum())
        self._aligned = aligned
        self._tiles = torch.from_numpy(numpy.concatenate([*tensors, numpy.zeros(1, numpy.int32)])).to(self.device)
        if self._functions.measure is not None:
            self._squares = torch.zeros(2 * first, dtype=torch.float64, device=self.device)

    def _words(self, group: GroupUpdate) -> Words:
        """What the kernels know of this step's tensors."""
        batch, states = self._batch, len(self._batch.codebooks)
        head = numpy.zeros(kernels.HEAD.value, numpy.int64)
        hyper = [0.0 if isinstance(value, Tensor) else float(value) for value in group.hyper.values()]
        head[: len(hyper)] = numpy.array(hyper).view(numpy.int64)
        head[kernels.SEED.value] = batch.seed
        rows, found = self._rows, group.addresses
        rows[:, : 3 + states] = found[:, : 3 + states]
        if batch.coded:
            rows[:, kernels.ABSMAX.value :][:, :states] = found[:, 3 + states :][:, :states]
        if batch.rounding == "compensated":
            rows[:, kernels.COMPENSATION.value] = found[:, -1]
        return numpy.concatenate([head, rows.reshape(-1)])


class Table:
    """The kernels' table on the device, and what it holds.

    Args:
        words: of 64 bits.
        device: that reads it.
        capturable: whether a CUDA graph may be captured.
    """

    def __init__(self, words: int, device: torch.device, capturable: bool) -> None:
        self.device = torch.zeros(words, dtype=torch.int64, device=device)
        self._held: Words | None = None
        self._is_pinned = device.type != "cpu"
        self._spare = self._pair() if capturable and self._is_pinned else None
        self._of_graphs: list[tuple[Tensor, Tensor]] = []

    def holding(self, words: Words) -> Tensor:
        """The table with these words, on the current stream; nothing is copied that it holds already."""
        if self._spare is not None and torch.cuda.is_current_stream_capturing():
            return self._of_graph(words)
        if self._held is None or not numpy.array_equal(words, self._held):
            source = torch.from_numpy(words)
            # Torch gives pinned memory to others only when the copy out of it is done.
            self.device.copy_(source.pin_memory() if self._is_pinned else source, non_blocking=True)
            self._held = words
        return self.device

    def _of_graph(self, words: Words) -> Tensor:
        """A table of the graph's own. The copy is a part of it, and repeated whenever it is replayed."""
        assert self._spare is not None
        pinned, table = self._spare
        self._of_graphs.append(self._spare)
        self._spare = self._pair()
        pinned.copy_(torch.from_numpy(words))
        return table.copy_(pinned, non_blocking=True)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.device.shape, dtype=torch.int64, pin_memory=True), torch.zeros_like(self.device)


def _rows(batch: Batch) -> Words:
    """(n, kernels.ROW): what does not change about the tensors; states that are not coded are one row of any blocks."""
    rows = numpy.zeros((len(batch.views), kernels.ROW.value), numpy.int64)
    rows[:, kernels.NUMBER.value] = batch.numbers
    for row, view in zip(rows, batch.views, strict=True):
        length = view.row_length if batch.coded else view.rows * view.row_length
        block = view.block_size if batch.coded else FULL_BLOCK
        per_row = -(-length // block)
        fields = (length, block, per_row, per_row * (view.rows if batch.coded else 1))
        row[kernels.ROW_LENGTH.value : kernels.BLOCKS.value + 1] = fields
    return rows


def _shape(row: NDArray[numpy.int64], is_aligned: bool) -> Shape:
    length, block = int(row[kernels.ROW_LENGTH.value]), int(row[kernels.BLOCK_SIZE.value])
    is_aligned = is_aligned and length % ALIGNMENT == 0 and block % ALIGNMENT == 0
    return Shape(triton.next_power_of_2(block), is_aligned)


def _wide_columns(batch: Batch) -> list[int]:
    """Of a step's addresses, those of elements that are loaded 16 bytes at a time."""
    states = range(3, 3 + len(batch.codebooks))
    return [0, 1, *states, *([-1] if batch.rounding == "compensated" else [])]


def _launch(kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
    kernel[(programs,)](*arguments, num_warps=warps, **OPTIONS)


def _warm_up(kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
    if isinstance(kernel, triton.JITFunction):  # not so in Triton's interpreter
        kernel.warmup(*arguments, grid=(programs,), num_warps=warps, **OPTIONS)
