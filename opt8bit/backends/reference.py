"""Plain torch on any device: what every other backend is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opt8bit.backends.interface import GroupUpdate, ParamUpdate, Rule, View


def to_blocks(x: Tensor, view: View) -> Tensor:
    """(rows, blocks per row, block_size), the short blocks padded with zeros."""
    rows = x.reshape(view.rows, view.row_length)
    padding = -view.row_length % view.block_size
    return F.pad(rows, (0, padding)).reshape(view.rows, -1, view.block_size)


def from_blocks(blocks: Tensor, view: View, shape: torch.Size) -> Tensor:
    return blocks.reshape(view.rows, -1)[:, : view.row_length].reshape(shape)


def quantize(x: Tensor, codebook: Tensor, view: View) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        blocks_per_row = -(-view.row_length // view.block_size)
        return x.to(torch.uint8), x.new_zeros((view.rows, blocks_per_row), dtype=torch.float32)
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


def step_param(update: ParamUpdate, rule: Rule, hyper: dict[str, float], codebooks: Sequence[Tensor]) -> None:
    compute = torch.promote_types(update.param.dtype, torch.float32)
    is_coded = len(update.absmaxes) > 0
    if is_coded:
        coded = zip(update.states, update.absmaxes, codebooks, strict=True)
        states = [dequantize(codes, absmax, book.to(codes.device), update.view) for codes, absmax, book in coded]
    else:
        states = [state.to(compute) for state in update.states]
    update.step.add_(1)
    param, *states = rule.update(
        update.param.to(compute), update.grad.to(compute), *states, step=update.step.item(), **hyper
    )
    update.param.copy_(param)
    for i, state in enumerate(states):
        if is_coded:
            codes, absmax = quantize(state, codebooks[i].to(state.device), update.view)
            update.states[i].copy_(codes)
            update.absmaxes[i].copy_(absmax)
        else:
            update.states[i].copy_(state)


class Reference:
    """The backend ``reference``."""

    name = "reference"

    def quantize_blockwise(
        self, x: Tensor, codebook: Tensor, view: View, codes: Tensor, absmax: Tensor
    ) -> None:
        new_codes, new_absmax = quantize(x, codebook, view)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, codebook: Tensor, view: View, x: Tensor
    ) -> None:
        x.copy_(dequantize(codes, absmax, codebook, view))

    def can_step(self, param: Tensor, grad: Tensor) -> bool:
        return True

    def step(self, groups: Sequence[GroupUpdate]) -> None:
        for group in groups:
            for update in group.params:
                step_param(update, group.rule, dict(group.hyper), group.codebooks)
