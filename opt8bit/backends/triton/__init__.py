"""CUDA, ROCm and XPU: kernels in Triton, which comes with torch's builds for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from opt8bit.backends.interface import DTYPES, Batch, Rule, Step, View
from opt8bit.backends.reference import step_batch
from opt8bit.backends.triton.blockwise import dequantize_kernel, encode_state_kernel, quantize_kernel
from opt8bit.backends.triton.codebook import midpoints
from opt8bit.backends.triton.launch_table import TILE, Shape
from opt8bit.backends.triton.launches import OPTIONS, Launches
from opt8bit.backends.triton.update_rules import functions_of


class Triton:
    """The backend ``triton``."""

    name = "triton"

    def quantize_blockwise(self, x: Tensor, codebook: Tensor, view: View, codes: Tensor, absmax: Tensor) -> None:
        _on_every_block(quantize_kernel, view, x, codes, absmax, midpoints(codebook), codebook.numel())

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, codebook: Tensor, view: View, x: Tensor) -> None:
        _on_every_block(dequantize_kernel, view, codes, absmax, codebook, x)

    def encode_state(self, x: Tensor, table: Tensor, signed: bool, view: View, codes: Tensor, scale: Tensor) -> None:
        _on_every_block(encode_state_kernel, view, x, codes, scale, midpoints(table), SIGNED=signed)

    def can_step(self, param: Tensor, grad: Tensor) -> bool:
        return param.dtype in DTYPES and grad.dtype == param.dtype

    def can_skip(self) -> bool:
        return False

    def has_kernel(self, rule: Rule) -> bool:
        return functions_of(rule) is not None

    def takes_channels_last(self, rule: Rule) -> bool:
        return False

    def prepare(self, batches: Sequence[Batch]) -> list[Launches | None]:
        """
        Raises:
            RuntimeError: a kernel does not compile.
        """
        return [_launches(batch) for batch in batches]

    @torch.no_grad()
    def step(self, step: Step) -> None:
        for each, launches in zip(step.of_batches(), step.prepared, strict=True):
            if launches is not None:
                with on(launches.device):
                    launches.step(each)
            elif not step.is_skipped():  # torch computes the step, and kernels code the states
                step_batch(each, self, step.grad_scale_on_host())


def _launches(batch: Batch) -> Launches | None:
    if functions_of(batch.rule) is None:
        return None
    with on(batch.device):
        return Launches(batch)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the one that kernels are launched on, on its current stream."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def _on_every_block(kernel: Callable[..., Any], view: View, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on every block of one tensor."""
    blocks = view.rows * view.blocks_per_row
    if blocks == 0:
        return
    shape = Shape(block=min(triton.next_power_of_2(view.block_size), TILE), is_aligned=False)
    extents = (view.row_length, view.block_size, view.blocks_per_row, blocks)
    with on(arguments[0].device):
        grid = (triton.cdiv(blocks, shape.blocks),)
        kernel[grid](  # type: ignore[index]
            *arguments, *extents, shape.blocks, shape.block, **constants, num_warps=shape.warps, **OPTIONS
        )
