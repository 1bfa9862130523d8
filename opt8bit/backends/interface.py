"""What a backend does, and how work is handed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor


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


class Rule(NamedTuple):
    """An update rule: a name that it shares with its kernels, if it has some, and the pure function that defines it."""

    name: str
    states: Mapping[str, bool]  # name in torch.optim: whether it can be negative
    hyper: tuple[str, ...]  # keywords of `update` besides `step`, in the order that the kernels take them
    update: Callable[..., tuple[Tensor, ...]]  # (param, grad, *states, step=, **hyper) -> (param, *states)


ROUNDINGS = ("nearest", "stochastic", "compensated")  # of a bfloat16 parameter, in the kernels' order


class GroupUpdate(NamedTuple):
    """Parameters to step that share a dtype, a rule, its hyper-parameters and how they are stored.

    Columns rather than one object a parameter, since a model may have thousands of them. With n parameters and
    k states of the rule, ``states`` and ``absmaxes`` list those of the first parameter, then of the second, ...
    """

    rule: Rule
    hyper: Mapping[str, Any]
    block_size: int
    rounding: str  # one of ROUNDINGS
    seed: int  # of stochastic rounding
    grad_scale: float  # the gradients are this many times too large
    params: Sequence[Tensor]  # n
    grads: Sequence[Tensor]  # n, each of its parameter's shape
    numbers: NDArray[numpy.int64]  # n, of each parameter in its optimizer
    steps: Sequence[Tensor]  # n, () float32 on the CPU: steps taken so far; the backend adds 1
    views: Sequence[View]  # n
    extents: NDArray[numpy.int64]  # (n, 2): rows and row length of each view
    states: Sequence[Tensor]  # n * k, each of its parameter's shape: uint8 codes, or values
    absmaxes: Sequence[Tensor]  # n * k, (rows, blocks per row); empty where the states hold values
    compensations: Sequence[Tensor]  # n, each int16 of its parameter's shape; empty unless compensated
    codebooks: Sequence[Tensor]  # k, (256,) float32 each
    addresses: NDArray[numpy.int64]  # (n, ·): of each param, grad, step, its states, absmaxes and compensation


class Backend(Protocol):
    """A machine. Inputs have been checked, codebooks are contiguous; outputs are written into the tensors given."""

    @property
    def name(self) -> str: ...

    def quantize_blockwise(self, x: Tensor, codebook: Tensor, view: View, codes: Tensor, absmax: Tensor) -> None:
        """Codes the contiguous ``x`` into ``codes`` and ``absmax``."""

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, codebook: Tensor, view: View, x: Tensor) -> None:
        """Writes the values of the contiguous ``codes`` into the contiguous ``x``."""

    def can_step(self, rule: Rule, param: Tensor) -> bool:
        """Whether :meth:`step` takes parameters of this dtype by this rule, if they and their gradients are
        contiguous and of one dtype."""
        ...

    def step(self, groups: Sequence[GroupUpdate]) -> None:
        """Takes one step: parameters, states and step counts are updated in place."""


DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
