"""state_error: how far 8-bit states are from exact ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.backends import Rule, stored_as
from opt8bit.optim import shards
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.table import aligned
from opt8bit.quant import block_view, decode_state, dynamic_map, encode_state

EXACT_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class StateError:
    """The error of one state of one parameter."""

    parameter: str
    state: str
    relative: float  # norm of the difference / norm of the exact state
    mean_levels: float  # see `levels`
    max_levels: float
    zeroed: float  # share of the elements that are stored as zero and are not zero


@dataclass(frozen=True)
class StateErrorReport:
    """One row for each 8-bit state measured; ``print`` shows it as a table."""

    rows: tuple[StateError, ...]
    full: int  # parameters left out as their states are stored in full, hence exactly
    skipped: int  # parameters left out as they have no states yet, or no gradient where one is needed

    def __str__(self) -> str:
        headings = ("parameter", "state", "relative", "mean levels", "max levels", "zeroed")
        cells = [
            (
                row.parameter,
                row.state,
                f"{row.relative:.2%}",
                f"{row.mean_levels:.3f}",
                f"{row.max_levels:.3f}",
                f"{row.zeroed:.2%}",
            )
            for row in self.rows
        ]
        left_out = f"left out: {self.full} parameters with states in full, {self.skipped} without states or gradient"
        return f"{aligned(headings, cells)}\n{left_out}"


class _Entry(NamedTuple):
    """A parameter, and where its states come from."""

    name: str
    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]
    rule: Rule
    group: dict[str, Any]
    place: tuple[int, int]  # number of the group, and of the parameter within it


class _Pair(NamedTuple):
    """A state as it is coded, and as it should be."""

    codes: Tensor  # uint8, any shape
    scale: Tensor  # (rows, blocks per row)
    exact: Tensor  # the shape of codes


@torch.no_grad()
def state_error(optimizer: Optimizer8bit, exact: torch.optim.Optimizer | None = None) -> StateErrorReport:
    """Measures how far an optimizer's 8-bit states are from exact ones, for each state of each parameter.

    An optimizer does not keep its exact states, so "exact" needs a definition. There are two.

    ``state_error(optimizer)``: what coding costs in one step. The rule runs once on the stored states and the
    gradients that are there; its results are the exact states, and what coding makes of them is held against them.
    Nothing is written. Errors of earlier steps are in both and do not show.

    ``state_error(optimizer, exact)``: what has come together since the first step. ``exact`` is an optimizer
    with full states by the same names that has seen the same gradients, with the same hyper-parameters. With
    ``lr=0`` it can stand beside the optimizer, over the same parameters, and leaves them alone::

        exact = AdamW8bit(model.parameters(), lr=0, state_bits=32)
        loss.backward(); exact.step(); optimizer.step()
        print(state_error(optimizer, exact))

    Of DTensors each process has the whole for a while, one parameter after another, and all must call this together.

    Args:
        optimizer: of this package.
        exact: None, or an optimizer of the same groups and shapes: of this package with ``state_bits=32``, or of
            torch.optim.

    Returns:
        A report of one row per 8-bit state: the relative error, ``norm(stored - exact) / norm(exact)``; mean and
        maximum of :func:`levels`; and the share of elements that are not zero but stored as zero. Coding in one step
        costs half a level at most, and less than one where a second moment near zero is kept above it. States stored
        in full are left out, and so are parameters without states or, where ``exact`` is None, without gradient; the
        report counts both. A parameter is named if the optimizer was made from named parameters, else it is
        "group 0, parameter 3". Values that are not finite give nan or inf.

    Raises:
        TypeError: ``optimizer`` is not one of this package, or ``exact`` is not an optimizer.
        ValueError: nothing can be measured, as no parameter has states, or gradients have been set to None; a
            gradient is not dense or not of its parameter's shape; ``exact`` has other parameters, other states,
            8-bit states, or has taken another number of steps.
    """
    if not isinstance(optimizer, Optimizer8bit):
        raise TypeError(f"optimizer must be one of opt8bit, got {_kind(optimizer)}")
    if exact is not None and not isinstance(exact, torch.optim.Optimizer):
        raise TypeError(f"exact must be an optimizer, got {_kind(exact)}")
    if exact is not None:
        _check_alike(optimizer, exact)
    rows: list[StateError] = []
    full = skipped = 0
    for entry in _entries(optimizer):
        if all(name in entry.state for name in entry.rule.states):
            full += 1
        elif not all(stored in entry.state for name in entry.rule.codable for stored in stored_as(name)):
            skipped += 1
        elif exact is None and entry.grad is None:
            skipped += 1
        else:
            pairs = _next_coding(optimizer, entry) if exact is None else _against(entry, exact)
            rows += [
                measure(entry.name, name, pairs[name], signed, entry.group["block_size"])
                for name, signed in entry.rule.codable.items()
            ]
    if skipped and not rows:
        needed = "states" if exact is not None else "states and a gradient (zero_grad() sets gradients to None)"
        raise ValueError(f"nothing to measure: no parameter has 8-bit {needed}; take a step first")
    return StateErrorReport(tuple(rows), full, skipped)


def measure(parameter: str, state: str, pair: _Pair, signed: bool, block_size: int) -> StateError:
    """Returns the error of one state."""
    stored = decode_state(pair.codes, pair.scale, signed, block_size)
    distance = levels(pair.exact, pair.codes, pair.scale, signed, block_size)
    lost = (stored == 0) & (pair.exact != 0)
    return StateError(
        parameter=parameter,
        state=state,
        relative=relative_error(stored, pair.exact),
        mean_levels=distance.mean().item(),
        max_levels=distance.max().item(),
        zeroed=lost.double().mean().item(),
    )


def relative_error(stored: Tensor, exact: Tensor) -> float:
    """Returns ``norm(stored - exact) / norm(exact)``: 0 where both are zero, inf where only ``exact`` is."""
    difference = (stored.double() - exact.double()).norm().item()
    norm = exact.double().norm().item()
    if norm == 0:
        return math.inf if difference else 0.0
    return difference / norm


def levels(
    exact: Tensor,  # any shape
    codes: Tensor,  # uint8, the shape of exact
    scale: Tensor,  # (rows, blocks per row)
    signed: bool,
    block_size: int,
) -> Tensor:
    """Returns how many codes lie between each exact value and its stored one, fractions included; float64.

    The scale is that of the stored state: code k stands at k, and values between two codes lie between them in
    proportion (beyond the first and the last as between the two outermost). The nearest code is thus never more
    than half a level away. inf where the block's scale is 0 and the exact value is not.
    """
    view = block_view(codes.shape, block_size)
    of_each = scale.double().repeat_interleave(view.block_size, dim=1)[:, : view.row_length].reshape(codes.shape)
    ratio = torch.where(exact == 0, 0.0, exact.double() / of_each)  # 0 / 0 is a zero that is exact
    ratio = torch.where(ratio.isinf(), exact.sign() * torch.inf, ratio)
    values = dynamic_map(signed).to(codes.device).double()
    zero_code = int((values == 0).nonzero())
    below = (torch.bucketize(ratio, values, right=True) - 1).clamp(0, len(values) - 2)
    position = below + (ratio - values[below]) / (values[below + 1] - values[below])
    return (position - (codes.long() + zero_code) % len(values)).abs()


def _entries(optimizer: Optimizer8bit) -> Iterator[_Entry]:
    """Yields the parameters under a rule that has states."""
    for group_index, group in enumerate(optimizer.param_groups):
        rule = optimizer.rule(group)
        names = group.get("param_names") or [
            f"group {group_index}, parameter {index}" for index in range(len(group["params"]))
        ]
        for index, (name, param) in enumerate(zip(names, group["params"], strict=True)):
            if rule.states and param.numel():
                whole, grad = shards.everywhere(param.detach()), shards.everywhere(param.grad)
                states = optimizer.state.get(param, {}).items()  # elsewhere, if they are offloaded
                state = {key: shards.everywhere(value).to(whole.device) for key, value in states}
                yield _Entry(name, whole, grad, state, rule, group, (group_index, index))


def _next_coding(optimizer: Optimizer8bit, entry: _Entry) -> dict[str, _Pair]:
    """Returns the states after one more step with the present gradient, exact and coded."""
    param, block_size = entry.param, entry.group["block_size"]
    grad = entry.grad
    assert grad is not None
    if grad.layout != torch.strided or grad.shape != param.shape:
        raise ValueError(
            f"{entry.name}: the gradient must be dense and of shape {tuple(param.shape)}, "
            f"got {grad.layout} and {tuple(grad.shape)}"
        )
    rule, states = entry.rule, dict(entry.state)
    for name, signed in rule.codable.items():
        codes, scale = stored_as(name)
        states[name] = decode_state(entry.state[codes], entry.state[scale], signed, block_size)
    step = entry.state["step"].item() + 1
    hyper = optimizer.hyper(entry.group)
    _, *exact = rule.update(param.float(), grad.float(), *(states[name] for name in rule.states), step=step, **hyper)
    return {
        name: _Pair(*encode_state(new, rule.codable[name], block_size), new)
        for name, new in zip(rule.states, exact, strict=True)
        if name in rule.codable
    }


def _against(entry: _Entry, exact: torch.optim.Optimizer) -> dict[str, _Pair]:
    """Returns the stored states, beside those of an optimizer that has them in full."""
    group_index, index = entry.place
    param = exact.param_groups[group_index]["params"][index]
    state = exact.state.get(param, {})
    steps = [float(each["step"]) for each in (entry.state, state) if "step" in each]
    if len(set(steps)) > 1:
        raise ValueError(f"{entry.name}: exact must have taken {steps[0]:.0f} steps, too, got {steps[1]:.0f}")
    pairs = {}
    for name in entry.rule.codable:
        if stored_as(name)[0] in state:
            raise ValueError(f"{entry.name}: exact has 8-bit states; give it state_bits=32")
        value = shards.everywhere(state.get(name))
        if not isinstance(value, Tensor):
            raise ValueError(f"{entry.name}: exact has no state {name!r}; has it been stepped?")
        if value.dtype not in EXACT_DTYPES or value.shape != entry.param.shape:
            raise ValueError(
                f"{entry.name}: state {name!r} of exact must be float32 or float64, of shape "
                f"{tuple(entry.param.shape)}, got {value.dtype} and {tuple(value.shape)}"
            )
        value = value.to(entry.param.device)
        codes, scale = (entry.state[stored] for stored in stored_as(name))
        pairs[name] = _Pair(codes, scale, value)
    return pairs


def _check_alike(optimizer: Optimizer8bit, exact: torch.optim.Optimizer) -> None:
    ours, theirs = ([len(group["params"]) for group in each.param_groups] for each in (optimizer, exact))
    if ours != theirs:
        raise ValueError(f"exact must have groups of {ours} parameters, as the optimizer has, got {theirs}")


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
