"""Keeps what is known of a batch of parameters between steps, and launches its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from opt8bit.backends.interface import Batch, BatchStep, is_interpreting
from opt8bit.backends.triton import codebook, layout
from opt8bit.backends.triton import optimizer_step as kernels
from opt8bit.backends.triton.launch_table import TILE, Cut, Launch, Shape, Table, Words
from opt8bit.backends.triton.update_rules import functions_of

Run = Callable[..., None]  # (kernel, programs, warps, **arguments)

ALIGNMENT = 16  # bytes of an address, and elements of a row and of a block, where loads are 16 bytes wide
# The compiler would fuse now one product of a sum, now the other, and an element have other bits in other places.
OPTIONS = {"enable_fp_fusion": False}
NEW_IN_CAPTURE = (
    "a step that is captured must be like one before: with gradients whose addresses are multiples of 16 where they "
    "were, and lr, grad_scale and found_inf of the same dtypes; take such a step first"
)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Launches:
    """The launches of a batch, and what they read and write beside the tensors.

    Args:
        batch: of a rule that has kernels.

    Raises:
        RuntimeError: a kernel does not compile. The message names the rule, the dtype and the device. Or what a graph
            cannot hold is needed while one is captured.
    """

    def __init__(self, batch: Batch) -> None:
        self.device = device = batch.device
        self._batch = batch
        functions = functions_of(batch.rule)
        assert functions is not None
        self._functions = functions
        self._rows = _rows(batch)
        self._head = numpy.zeros((), layout.HEAD_FIELDS)
        self._head["seed"] = batch.seed
        assert len(batch.rule.hyper) <= self._head["hyper"].size
        assert len(functions.kind._fields) <= layout.MAX_CONSTANTS.value
        self._cuts: dict[bytes, Cut] = {}
        self._compiled: set[tuple[Any, ...]] = set()
        count = len(self._rows)
        self._constants = torch.zeros(count, layout.MAX_CONSTANTS.value, dtype=torch.float32, device=device)
        self._keys = torch.zeros(count, dtype=torch.int64, device=device)
        self._table = Table(layout.HEAD.value + count * layout.ROW.value, device, batch.capturable)
        pairs = list(zip(batch.codebooks, batch.rule.states.values(), strict=True))
        tables = [codebook.tables(values, signed) for values, signed in pairs]
        between = [codebook.midpoints(values) for values, _ in pairs]
        # With one number more, as a rule may have no states.
        self._maps = torch.cat([*tables, torch.zeros(1, dtype=torch.float32, device="cpu")]).to(device)
        self._midpoints = torch.cat([*between, torch.zeros(1, dtype=torch.float64, device="cpu")]).to(device)
        self._compile(self._cut(numpy.ones(count, numpy.bool_)), None, None, None)

    def step(self, group: BatchStep) -> None:
        """Takes the step of the batch, on the current stream."""
        cut = self._cut(_is_aligned(group))
        lr, grad_scale, found_inf = (
            value.to(self.device) if isinstance(value, Tensor) else None
            for value in (group.hyper["lr"], group.grad_scale, group.found_inf)
        )
        self._compile(cut, lr, grad_scale, found_inf)
        self._run(_launch, cut, self._table.holding(self._words(group, cut)), lr, grad_scale, found_inf)

    def _run(
        self,
        run: Run,
        cut: Cut,
        table: Tensor,
        lr: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        functions = self._functions
        set_constants = functools.partial(
            run,
            kernels.constants_kernel,
            len(self._rows),
            table=table,
            constants=self._constants,
            keys=self._keys,
            squares=cut.squares,
            lr=lr,
            found_inf=found_inf,
            CONSTANTS=functions.constants,
            HYPER=len(self._batch.rule.hyper),
        )
        set_constants(warps=1, AFTER_MEASURE=False)  # a second one might read the new count of steps
        work = [(launch, self._arguments(cut, launch, table, grad_scale)) for launch in cut.launches]
        if functions.measure is not None:
            measured = {"squares": cut.squares, "MEASURE": functions.measure}
            for launch, arguments in work:
                run(kernels.measure_kernel, launch.tiles, launch.shape.warps, **arguments, **measured)
            set_constants(warps=8, AFTER_MEASURE=True)
        written = {"keys": self._keys, "midpoints": self._midpoints, "found_inf": found_inf, "UPDATE": functions.update}
        for launch, arguments in work:
            run(kernels.step_kernel, launch.tiles, launch.shape.warps, **arguments, **written)

    def _arguments(self, cut: Cut, launch: Launch, table: Tensor, grad_scale: Tensor | None) -> dict[str, Any]:
        """Returns what the kernels that go through tiles take alike."""
        batch, shape = self._batch, launch.shape
        return {
            "table": table,
            "tiles": cut.tiles,
            "first_tile": launch.first_tile,
            "constants": self._constants,
            "maps": self._maps,
            "grad_scale": grad_scale,
            "COUNT": len(self._functions.kind._fields),
            "SIGNED": tuple(batch.rule.states.values()),
            "CODED": batch.coded,
            "ROUNDING": batch.rounding if batch.dtype == torch.bfloat16 else "nearest",
            "DTYPE": TYPES[batch.dtype],
            "BLOCKS_PER_TILE": shape.blocks,
            "BLOCK": shape.block,
            "ALIGNED": shape.is_aligned,
        }

    def _compile(self, cut: Cut, lr: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Compiles every kernel before one runs, as a step that fails half-way would have been half taken."""
        shapes = tuple(launch.shape for launch in cut.launches)
        kind = shapes, *(None if value is None else value.dtype for value in (lr, grad_scale, found_inf))
        if kind in self._compiled:
            return
        self._check_no_capture()
        try:
            self._run(_warm_up, cut, self._table.on_device, lr, grad_scale, found_inf)
        except Exception as error:  # of many kinds: the front end's, LLVM's, the driver's
            batch = self._batch
            raise RuntimeError(
                f"the Triton kernels of {batch.rule.name} for {batch.dtype} do not compile for {self.device}: {error}"
            ) from error
        self._compiled.add(kind)

    def _cut(self, aligned: NDArray[numpy.bool_]) -> Cut:
        """Returns the tensors cut into tiles; ``aligned`` says whose addresses are multiples of 16.

        None is ever given up: gradients come back to where they were, and graphs hold on to it.
        """
        key = aligned.tobytes()
        if key not in self._cuts:
            self._check_no_capture()
            self._cuts[key] = self._new_cut(aligned)
        return self._cuts[key]

    def _check_no_capture(self) -> None:
        """Refuses what a graph cannot hold: memory that is copied from the host, and kernels that are loaded."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NEW_IN_CAPTURE)

    def _new_cut(self, aligned: NDArray[numpy.bool_]) -> Cut:
        blocks = self._rows["blocks"]
        shapes = [_shape(row, bool(is_aligned)) for row, is_aligned in zip(self._rows, aligned, strict=True)]
        places, launches, tensors, first = numpy.zeros((len(shapes), 2), numpy.int64), [], [], 0
        for shape in sorted(set(shapes)):
            members = numpy.flatnonzero(numpy.array([other == shape for other in shapes]) & (blocks > 0))
            counts = -(-blocks[members] // shape.blocks)
            places[members, 0] = first + numpy.cumsum(counts) - counts
            places[members, 1] = counts
            tensors.append(numpy.repeat(members, counts).astype(numpy.int32))
            if len(members):
                launches.append(Launch(shape, first, int(counts.sum())))
            first += int(counts.sum())
        tiles = torch.from_numpy(numpy.concatenate([*tensors, numpy.zeros(1, numpy.int32)])).to(self.device)
        squares = None
        if self._functions.measure is not None:
            squares = torch.zeros(2 * first, dtype=torch.float64, device=self.device)
        return Cut(launches, places, tiles, squares)

    def _words(self, group: BatchStep, cut: Cut) -> Words:
        """Returns what the kernels know of this step's tensors."""
        head, rows = self._head, self._rows
        hyper = [0.0 if isinstance(value, Tensor) else float(value) for value in group.hyper.values()]
        head["hyper"][: len(hyper)] = hyper
        rows["first_tile"], rows["tiles"] = cut.places.T
        rows["at"] = group.addresses
        return numpy.concatenate([head.reshape(1).view(numpy.int64), rows.view(numpy.int64)])


def _rows(batch: Batch) -> NDArray[numpy.void]:
    """Returns what does not change about the tensors, (n,); states that are not coded are one row of any blocks."""
    rows = numpy.zeros(len(batch.views), layout.ROW_FIELDS)
    rows["number"], rows["first_element"] = batch.numbers, batch.firsts
    for row, view in zip(rows, batch.views, strict=True):
        length = view.row_length if batch.coded else view.rows * view.row_length
        block = view.block_size if batch.coded else TILE
        per_row = -(-length // block)
        row["row_length"], row["block_size"], row["blocks_per_row"] = length, block, per_row
        row["blocks"] = per_row * (view.rows if batch.coded else 1)
    return rows


def _shape(row: numpy.void, is_aligned: bool) -> Shape:
    length, block = int(row["row_length"]), int(row["block_size"])
    is_aligned = is_aligned and length % ALIGNMENT == 0 and block % ALIGNMENT == 0
    return Shape(triton.next_power_of_2(block), is_aligned)


def _is_aligned(group: BatchStep) -> NDArray[numpy.bool_]:
    """Tells whether all elements that are loaded 16 bytes at a time lie at multiples of that, (n,)."""
    at, batch = group.addresses, group.batch
    bits = at["param"] | at["grad"] | numpy.bitwise_or.reduce(at["states"][:, : len(batch.codebooks)], axis=1)
    if batch.rounding == "compensated":
        bits = bits | at["compensation"]
    return bits % ALIGNMENT == 0


def _launch(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
    kernel[(programs,)](**arguments, num_warps=warps, **OPTIONS)


def _warm_up(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
    """Compiles only, and has the device load what comes of it."""
    if not is_interpreting():
        compiled: Any = kernel.warmup(**arguments, grid=(programs,), num_warps=warps, **OPTIONS)
        assert compiled.run is not None
