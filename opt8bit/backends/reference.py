"""Plain torch on any device: what every other backend is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opt8bit.backends.interface import COMPENSATION, Backend, Batch, BatchStep, Rule, Step, View, stored_as
from opt8bit.backends.rounding import compensated, set_compensated, stochastically_rounded

TOGETHER = 8 << 20  # elements that are stepped together: more would take more memory, and save little time


def to_blocks(x: Tensor, view: View) -> Tensor:
    """Returns a tensor as (rows, blocks per row, block_size), the short blocks padded with zeros."""
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
    """Steps one parameter after another by the pure rule; ``coder`` decodes and encodes the states."""
    hyper, parts = batch_step.hyper_on_host(), batch_step.batch.rule.parts
    present = [i for i, grad in enumerate(batch_step.grads) if grad is not None]
    if parts:
        for indices in _equal(batch_step.params, present):
            _step_together(batch_step, indices, coder, hyper, grad_scale, parts)
        return
    for i in present:
        read = *_param_and_grad(batch_step, i, grad_scale), *_decoded(batch_step, i, coder)
        step = batch_step.states[i]["step"].item() + 1
        new_param, *new_states = batch_step.batch.rule.update(*read, step=step, **hyper)
        # All that may fail has been done: from here on, tensors are written.
        _write(batch_step, i, coder, new_param, new_states)


def _equal(params: Sequence[Tensor], indices: Sequence[int]) -> Iterator[list[int]]:
    """Divides some parameters into runs of one shape, of no more elements than are stepped together."""
    alike: dict[torch.Size, list[int]] = {}
    for i in indices:
        alike.setdefault(params[i].shape, []).append(i)
    for shape, found in alike.items():
        at_once = max(1, TOGETHER // max(1, shape.numel()))
        for first in range(0, len(found), at_once):
            yield found[first : first + at_once]


def _step_together(
    batch_step: BatchStep,
    indices: Sequence[int],
    coder: Backend,
    hyper: Mapping[str, Any],
    grad_scale: float,
    parts: tuple[Callable[..., Any], ...],
) -> None:
    begin, go_on, end = parts

    def begun(i: int, grad: Tensor) -> tuple[Tensor, ...]:
        states = _decoded(batch_step, i, coder)
        return begin(grad, *(states if batch_step.batch.coded else map(torch.clone, states)), **hyper)

    params, grads = zip(*(_param_and_grad(batch_step, i, grad_scale) for i in indices), strict=True)
    x, *new_states = zip(*map(begun, indices, grads), strict=True)
    x = [go_on(x[0], **hyper)] if len(x) == 1 else go_on(torch.stack(x), **hyper)
    for i, param, mine, *states in zip(indices, params, x, *new_states, strict=True):
        _write(batch_step, i, coder, end(param, mine, **hyper), states)


def _param_and_grad(batch_step: BatchStep, i: int, grad_scale: float) -> tuple[Tensor, Tensor]:
    """Returns parameter and gradient in at least float32, complex numbers as pairs."""
    param, grad, kept = batch_step.params[i], batch_step.grads[i], _compensation(batch_step, i)
    assert grad is not None
    compute = torch.promote_types(param.dtype, torch.float32)
    grad = as_real(grad.to(compute))
    grad = grad if grad_scale == 1 else grad * (1 / grad_scale)
    return as_real(param.to(compute)) if kept is None else compensated(param, kept), grad


def _decoded(batch_step: BatchStep, i: int, coder: Backend) -> list[Tensor]:
    """Returns the states of a parameter."""
    batch, param, state = batch_step.batch, batch_step.params[i], batch_step.states[i]
    coded = batch.rule.codable if batch.coded else {}
    result = []
    for name, codebook in zip(batch.rule.states, batch.codebooks, strict=True):
        if name in coded:
            values = torch.empty(param.shape, dtype=torch.float32, device=param.device)
            codes, scale = (state[stored] for stored in stored_as(name))
            coder.dequantize_blockwise(codes, scale, codebook.to(param.device), batch.views[i], values)
            result.append(values)
        else:
            result.append(as_real(state[name]))
    return result


def _write(batch_step: BatchStep, i: int, coder: Backend, new_param: Tensor, new_states: Sequence[Tensor]) -> None:
    """Rounds a parameter and its states to what they are stored as."""
    batch, param, state = batch_step.batch, batch_step.params[i], batch_step.states[i]
    coded = batch.rule.codable if batch.coded else {}
    kept = _compensation(batch_step, i)
    if kept is not None:
        set_compensated(param, kept, new_param)
    elif batch.rounding == "stochastic" and param.dtype == torch.bfloat16:
        number, first, step = int(batch.numbers[i]), int(batch.firsts[i]), int(state["step"].item() + 1)
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
    """Returns the bits that a bfloat16 parameter has no room for, if they are kept."""
    is_kept = batch_step.batch.rounding == "compensated"
    return batch_step.states[i][COMPENSATION].view(torch.int16)[..., 0] if is_kept else None


def _without_infinities(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns states with zeros for each element of which one state is infinite.

    An infinity, as the largest of its block, would weigh on the others from then on.
    """
    if all(bool(torch.stack(state.aminmax()).isfinite().all()) for state in states):
        return states
    is_infinite = torch.stack([state.isinf() for state in states]).any(0)
    return [torch.where(is_infinite, 0, state) for state in states]


def keep_positive(codes: Tensor, values: Tensor) -> None:
    """Keeps what is positive from becoming zero in a state that cannot be negative.

    Steps divide by its root: beside a first moment that is not zero, zero would leave them only eps to divide by.
    """
    codes[(codes == 0) & (values > 0) & values.isfinite()] = 1


def as_real(x: Tensor) -> Tensor:
    """Returns a complex tensor as pairs of numbers, as torch.optim takes it; any other as it is."""
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

    def can_step(self, param: Tensor, grad: Tensor) -> bool:
        return True

    def can_skip(self) -> bool:
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
