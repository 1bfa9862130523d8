"""Plain torch on any device: what every other backend is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opt8bit.backends.interface import GroupUpdate, View


def to_blocks(x: Tensor, view: View) -> Tensor:
    """(rows, blocks per row, block_size), the short blocks padded with zeros."""
    rows = x.reshape(view.rows, view.row_length)
    padding = -view.row_length % view.block_size
    return F.pad(rows, (0, padding)).reshape(view.rows, -1, view.block_size)


def from_blocks(blocks: Tensor, view: View, shape: torch.Size) -> Tensor:
    return blocks.reshape(view.rows, -1)[:, : view.row_length].reshape(shape)


def quantize(x: Tensor, codebook: Tensor, view: View) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return x.to(torch.uint8), x.new_zeros((view.rows, view.blocks_per_row), dtype=torch.float32)
    blocks = to_blocks(x.float(), view)
    absmax = torch.where(blocks.isfinite(), blocks.abs(), 0).amax(-1)
    # In float64 a quotient of float32 numbers compares with a midpoint as the exact quotient does: where the two
    # differ at all, they differ by more than its rounding error.
    ratio = blocks.double() / torch.where(absmax > 0, absmax, 1)[..., None].double()
    midpoints = (codebook[1:].double() + codebook[:-1].double()) / 2
    codes = torch.bucketize(ratio, midpoints)
    is_zero = blocks.isnan() | (absmax == 0)[..., None]
    codes = torch.where(is_zero, torch.bucketize(midpoints.new_zeros(()), midpoints), codes)
    return from_blocks(codes.to(torch.uint8), view, x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, codebook: Tensor, view: View) -> Tensor:
    if codes.numel() == 0:
        return codes.float()
    blocks = codebook[to_blocks(codes, view).long()] * absmax[..., None]
    return from_blocks(blocks, view, codes.shape)


def step_group(group: GroupUpdate) -> None:
    count = len(group.codebooks)
    for i, (param, grad, step, view) in enumerate(
        zip(group.params, group.grads, group.steps, group.views, strict=True)
    ):
        stored = group.states[i * count : (i + 1) * count]
        absmaxes = group.absmaxes[i * count : (i + 1) * count]
        books = [codebook.to(param.device) for codebook in group.codebooks]
        compute = torch.promote_types(param.dtype, torch.float32)
        if absmaxes:
            coded = zip(stored, absmaxes, books, strict=True)
            states = [dequantize(codes, absmax, book, view) for codes, absmax, book in coded]
        else:
            states = [state.to(compute) for state in stored]
        step.add_(1)
        new_param, *new_states = group.rule.update(
            param.to(compute), grad.to(compute), *states, step=step.item(), **group.hyper
        )
        param.copy_(new_param)
        for k, state in enumerate(new_states):
            if absmaxes:
                codes, absmax = quantize(state, books[k], view)
                stored[k].copy_(codes)
                absmaxes[k].copy_(absmax)
            else:
                stored[k].copy_(state)


class Reference:
    """The backend ``reference``."""

    name = "reference"

    def quantize_blockwise(self, x: Tensor, codebook: Tensor, view: View, codes: Tensor, absmax: Tensor) -> None:
        new_codes, new_absmax = quantize(x, codebook, view)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, codebook: Tensor, view: View, x: Tensor) -> None:
        x.copy_(dequantize(codes, absmax, codebook, view))

    def can_step(self, param: Tensor, grad: Tensor) -> bool:
        return True

    def step(self, groups: Sequence[GroupUpdate]) -> None:
        for group in groups:
            step_group(group)
