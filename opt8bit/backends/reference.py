"""Plain torch on any device: what every other backend is held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opt8bit.backends.interface import COMPENSATION, Backend, Batch, BatchStep, Rule, Step, View, stored_as
from opt8bit.backends.rounding import compensated, set_compensated, stochastically_rounded

STACKED = 5 << 20  # elements that are stepped together: more would take more memory, and save little time


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


def encode_state(x: Tensor, table: Tensor, signed: bool, view: View) -> tuple[Tensor, Tensor]:
    """Returns codes and scales as :func:`opt8bit.quant.encode_state` says; ``table`` has a value for each code."""
    ascending, code_of = table.sort()
    x = x if signed else x.clamp(min=0)
    if x.numel() == 0:
        return quantize(x, ascending, view)
    blocks = to_blocks(x, view)
    finite = torch.where(blocks.isfinite(), blocks, 0)
    first = finite.abs().argmax(-1, keepdim=True)  # of equal ones
    mirror = torch.where(finite.gather(-1, first) < 0, -1.0, 1.0)
    ranks, absmax = quantize(from_blocks(blocks * mirror, view, x.shape), ascending, view)
    codes = code_of[ranks.long()].to(torch.uint8)
    if not signed:
        keep_positive(codes, x)
    return codes, absmax * mirror[..., 0]


@torch.no_grad()
def step_batch(batch_step: BatchStep, coder: Backend, grad_scale: float) -> None:
    """Steps parameters one by one, or equal ones together, by the pure rule; ``coder`` decodes and encodes states."""
    hyper = batch_step.hyper_on_host()
    for indices in _together(batch_step):
        _step_parameters(batch_step, indices, coder, hyper, grad_scale)


def _together(batch_step: BatchStep) -> Iterator[list[int]]:
    """Divides the parameters of a batch: each alone, or several of one shape where the rule takes those stacked."""
    alike: dict[Any, list[int]] = {}
    for i, (param, state) in enumerate(zip(batch_step.params, batch_step.states, strict=True)):
        key = (param.shape, state["step"].item()) if batch_step.batch.rule.stacked else i
        alike.setdefault(key, []).append(i)
    for indices in alike.values():
        at_once = max(1, STACKED // max(1, batch_step.params[indices[0]].numel()))
        for first in range(0, len(indices), at_once):
            yield indices[first : first + at_once]


def _step_parameters(
    batch_step: BatchStep, indices: Sequence[int], coder: Backend, hyper: Mapping[str, Any], grad_scale: float
) -> None:
    update, step = batch_step.batch.rule.update, batch_step.states[indices[0]]["step"].item() + 1
    read = [_read(batch_step, i, coder, grad_scale) for i in indices]
    if len(read) == 1:
        made = [update(*read[0], step=step, **hyper)]
    else:
        made = list(zip(*update(*map(torch.stack, zip(*read, strict=True)), step=step, **hyper), strict=True))
    # All that may fail has been done: from here on, tensors are written.
    for i, (new_param, *new_states) in zip(indices, made, strict=True):
        _write(batch_step, i, coder, int(step), new_param, new_states)


def _read(batch_step: BatchStep, i: int, coder: Backend, grad_scale: float) -> list[Tensor]:
    """A parameter, its gradient and its states, as a rule takes them."""
    batch, param, state = batch_step.batch, batch_step.params[i], batch_step.states[i]
    coded = batch.rule.codable if batch.coded else {}
    states = []
    for name, codebook in zip(batch.rule.states, batch.codebooks, strict=True):
        if name in coded:
            decoded = torch.empty(param.shape, dtype=torch.float32, device=param.device)
            codes, scale = (state[stored] for stored in stored_as(name))
            coder.dequantize_blockwise(codes, scale, codebook.to(param.device), batch.views[i], decoded)
            states.append(decoded)
        else:
            states.append(as_real(state[name]))
    compute = torch.promote_types(param.dtype, torch.float32)
    grad = as_real(batch_step.grads[i].to(compute))
    grad = grad if grad_scale == 1 else grad * (1 / grad_scale)
    kept = _compensation(batch_step, i)
    return [as_real(param.to(compute)) if kept is None else compensated(param, kept), grad, *states]


def _write(
    batch_step: BatchStep, i: int, coder: Backend, step: int, new_param: Tensor, new_states: Sequence[Tensor]
) -> None:
    """Rounds a parameter and its states to what they are stored as."""
    batch, param, state = batch_step.batch, batch_step.params[i], batch_step.states[i]
    coded = batch.rule.codable if batch.coded else {}
    kept = _compensation(batch_step, i)
    if kept is not None:
        set_compensated(param, kept, new_param)
    elif batch.rounding == "stochastic" and param.dtype == torch.bfloat16:
        number, first = int(batch.numbers[i]), int(batch.firsts[i])
        param.copy_(stochastically_rounded(new_param, batch.seed, step, number, first))
    else:
        param.copy_(torch.view_as_complex(new_param.contiguous()) if param.is_complex() else new_param)
    if batch.coded and param.numel():
        new_states = _without_infinities(new_states)
    for (name, signed), codebook, new in zip(batch.rule.states.items(), batch.codebooks, new_states, strict=True):
        if name in coded:
            codes, scale = (state[stored] for stored in stored_as(name))
            coder.encode_state(new.contiguous(), codebook.to(param.device), signed, batch.views[i], codes, scale)
        else:
            as_real(state[name]).copy_(new)
    state["step"].add_(1)


def _compensation(batch_step: BatchStep, i: int) -> Tensor | None:
    """The bits that a bfloat16 parameter has no room for, if they are kept."""
    is_kept = batch_step.batch.rounding == "compensated"
    return batch_step.states[i][COMPENSATION].view(torch.int16)[..., 0] if is_kept else None


def _without_infinities(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """States of which an element begins anew, with zeros, where one of them is infinite: an infinity, as the largest of
    its block, would weigh on the others from then on."""
    if all(bool(torch.stack(state.aminmax()).isfinite().all()) for state in states):
        return states
    is_infinite = torch.stack([state.isinf() for state in states]).any(0)
    return [torch.where(is_infinite, 0, state) for state in states]


def keep_positive(codes: Tensor, values: Tensor) -> None:
    """Of a state that cannot be negative, what is positive does not become zero, but the least positive value.

    Steps divide by its root: beside a first moment that is not zero, zero would leave them eps alone to divide by.
    """
    codes[(codes == 0) & (values > 0) & values.isfinite()] = 1


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of numbers, as torch.optim takes it; any other as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


class Reference:
    """The backend ``reference``."""

    name = "reference"

    def quantize_blockwise(self, x: Tensor, codebook: Tensor, view: View, codes: Tensor, absmax: Tensor) -> None:
        new_codes, new_absmax = quantize(x, codebook, view)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, codebook: Tensor, view: View, x: Tensor) -> None:
        x.copy_(dequantize(codes, absmax, codebook, view))

    def encode_state(self, x: Tensor, table: Tensor, signed: bool, view: View, codes: Tensor, scale: Tensor) -> None:
        new_codes, new_scale = encode_state(x, table, signed, view)
        codes.copy_(new_codes)
        scale.copy_(new_scale)

    def can_step(self, param: Tensor) -> bool:
        return True

    def has_kernel(self, rule: Rule) -> bool:
        return False

    def takes_channels_last(self, rule: Rule) -> bool:
        return False

    def prepare(self, batches: Sequence[Batch]) -> None:
        return None

    def step(self, step: Step) -> None:
        if step.is_skipped():
            return
        grad_scale = step.grad_scale_on_host()
        for each in step.of_batches():
            step_batch(each, self, grad_scale)
