"""torch.optim's dialect: states in full, by the names of our rules except one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opt8bit.backends import as_real
from opt8bit.optim.dialects.dialect import ADDED_LATER, Dialect, Group, Place, State, refuse_unknown, value_of
from opt8bit.optim.reading import Read, read_full, read_step

VARIANCE_OF = {"square_avg": False, "grad_avg": True}  # what centered RMSprop keeps there: whether it can be negative


def _is_torchs(group: Group, states: Sequence[State]) -> bool:
    return True  # or of no optimizer at all, which shows in what it lacks


def _states(place: Place, group: Group, state: State) -> Read:
    state = {name: value for name, value in state.items() if value is not None}  # a buffer that SGD has not begun
    refuse_unknown(place, state, {"step", *place.rule.states, *place.others, *VARIANCE_OF})
    is_stepless = not place.rule.torch_counts_steps
    if is_stepless and not set(state) & set(place.rule.states):
        return {}
    # SGD does not dampen the first gradient, and here tells it by the step: where there is a buffer, it has passed.
    step = state.get("step", 1) if is_stepless else value_of(place, state, "step")
    read: Read = {"step": read_step(place.where, step)}
    for name, signed in place.rule.states.items():
        read[name] = _variance(place, state) if name == "variance" else _full(place, state, name, signed)
    return read


def _full(place: Place, state: State, name: str, signed: bool) -> Tensor:
    return read_full(place.where, name, value_of(place, state, name), place.param, signed)


def _variance(place: Place, state: State) -> Tensor:
    mean_square, mean = (as_real(_full(place, state, name, signed)) for name, signed in VARIANCE_OF.items())
    variance = (mean_square - mean * mean).clamp_(min=0)  # the difference of two rounded numbers may be negative
    return torch.view_as_complex(variance) if place.param.is_complex() else variance


TORCH = Dialect(
    _is_torchs,
    lambda rule, group: group,
    _states,
    unused=("decoupled_weight_decay",),
    missing=ADDED_LATER,
)
