"""Defines what a backend does, and how work is handed to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from opt8bit.backends.rule import MAX_STATES, Rule


class View(Protocol):
    """A tensor as rows of blocks; see :class:`opt8bit.quant.BlockView`."""

    @property
    def rows(self) -> int: ...
    @property
    def row_length(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def blocks_per_row(self) -> int: ...


ROUNDINGS = ("nearest", "stochastic", "compensated")  # of a bfloat16 parameter, in the kernels' order
COMPENSATION = "compensation"  # the state that holds what a bfloat16 parameter rounds away of its float32 bits

# Where the tensors of a parameter lie: the kernels' tables of tensors begin with it. 0 where there is none.
ADDRESSES = numpy.dtype(
    [
        ("param", numpy.int64),
        ("grad", numpy.int64),
        ("step", numpy.int64),
        ("states", numpy.int64, MAX_STATES),  # or their codes
        ("scales", numpy.int64, MAX_STATES),
        ("compensation", numpy.int64),
    ]
)


def stored_as(name: str) -> tuple[str, str]:
    """Returns the names under which a state's codes and scales lie in ``optimizer.state[p]``.

    They are not torch.optim's name of the state, which stands for numbers: who takes codes for numbers finds nothing.
    """
    return f"{name}_codes", f"{name}_scale"


class Batch(NamedTuple):
    """Holds what stays the same from step to step about n parameters that are stored and stepped alike."""

    rule: Rule
    block_size: int
    rounding: str  # one of ROUNDINGS
    seed: int  # of stochastic rounding
    dtype: torch.dtype  # of the parameters
    grad_dtype: torch.dtype
    device: torch.device
    coded: bool  # states are codes with their scales, not values
    capturable: bool  # a step may be captured in a CUDA graph
    numbers: NDArray[numpy.int64]  # (n,): of each parameter in its optimizer
    firsts: NDArray[numpy.int64]  # (n,): index of each one's first element in the whole parameter, if it is a shard
    views: Sequence[View]  # n
    extents: NDArray[numpy.int64]  # (n, 2): rows and row length of each view
    positions: NDArray[numpy.int64]  # (n,): height * width of a channel, where channels lie last in memory; else 0
    codebooks: Sequence[Tensor]  # the state map of each state of the rule, (256,) float32


class BatchStep(NamedTuple):
    """One step of a batch."""

    batch: Batch
    hyper: Mapping[str, Any]  # lr may be a tensor on the parameters' device
    grad_scale: Tensor | None  # of one element: the gradients are this many times too large
    found_inf: Tensor | None  # of one element: not zero if the step is to be skipped
    params: Sequence[Tensor]  # n
    grads: Sequence[Tensor | None]  # n, each of its parameter's shape; None where that is left as it is
    # n, by name: "step", a float32 scalar to which the backend adds 1; the rule's states, of the parameter's shape, or
    # their codes of that shape and scales of (rows, blocks per row); "compensation", the two bytes of an int16 for
    # each element.
    states: Sequence[Mapping[str, Tensor]]
    addresses: NDArray[numpy.void]  # (n,), ADDRESSES: where each lies; 0 for the step of one without a gradient

    def hyper_on_host(self) -> dict[str, Any]:
        """Returns numbers only; waits for the device where lr lies on one."""
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in self.hyper.items()}


class Step(NamedTuple):
    """One step of all batches that a backend serves."""

    batches: Sequence[Batch]
    hyper: Sequence[Mapping[str, Any]]  # of each batch
    grad_scale: Tensor | None
    found_inf: Tensor | None
    prepared: Any  # what the backend made of the batches
    params: Sequence[Tensor]  # of the first batch, of the second, ...; grads, states and addresses alike
    grads: Sequence[Tensor | None]
    states: Sequence[Mapping[str, Tensor]]
    addresses: NDArray[numpy.int64]  # (n, words of ADDRESSES), written anew in the next step
    copies: Sequence[tuple[Tensor, Tensor]] = ()  # (parameter, the contiguous copy that is stepped in its place)

    def of_batches(self) -> Iterator[BatchStep]:
        """Yields the step of each batch."""
        first, addresses = 0, self.addresses.view(ADDRESSES)[:, 0]
        for batch, hyper in zip(self.batches, self.hyper, strict=True):
            mine = slice(first, first + len(batch.views))
            columns = (self.params[mine], self.grads[mine], self.states[mine], addresses[mine])
            yield BatchStep(batch, hyper, self.grad_scale, self.found_inf, *columns)
            first = mine.stop

    def grad_scale_on_host(self) -> float:
        return 1.0 if self.grad_scale is None else self.grad_scale.item()

    def is_skipped(self) -> bool:
        return self.found_inf is not None and self.found_inf.item() != 0


class Backend(Protocol):
    """A machine. Inputs have been checked, codebooks are contiguous; outputs are written into the tensors given."""

    @property
    def name(self) -> str: ...

    def quantize_blockwise(self, x: Tensor, codebook: Tensor, view: View, codes: Tensor, absmax: Tensor) -> None:
        """Codes the contiguous ``x`` into ``codes`` and ``absmax``."""

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, codebook: Tensor, view: View, x: Tensor) -> None:
        """Writes the values of the contiguous ``codes`` into the contiguous ``x``; ``absmax`` may have signs."""

    def encode_state(self, x: Tensor, table: Tensor, signed: bool, view: View, codes: Tensor, scale: Tensor) -> None:
        """Codes the contiguous float32 ``x`` as :func:`opt8bit.quant.encode_state` says; ``table`` is the state map."""

    def can_step(self, param: Tensor, grad: Tensor) -> bool:
        """Tells whether :meth:`step` takes parameters and gradients of these dtypes, if both are contiguous."""
        ...

    def can_skip(self) -> bool:
        """Tells whether :meth:`step` leaves those parameters as they are that have no gradient."""
        ...

    def has_kernel(self, rule: Rule) -> bool:
        """Tells whether compiled code takes a full step by a rule. Else torch does, and kernels code the states."""
        ...

    def takes_channels_last(self, rule: Rule) -> bool:
        """Tells whether :meth:`step` takes parameters and gradients of which the channels lie last in memory."""
        ...

    def prepare(self, batches: Sequence[Batch]) -> Any:
        """Returns what is kept about batches from step to step, if anything."""
        ...

    def step(self, step: Step) -> None:
        """Takes one step: parameters, states and step counts are updated in place."""


def note_writes(tensors: list[Tensor]) -> None:
    """Tells autograd of what a backend has written, which it does not see."""
    try:
        increment_version(tensors)
    except TypeError:  # of older torch, which takes one at a time
        for tensor in tensors:
            increment_version(tensor)


def is_interpreting() -> bool:
    """Tells whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
