"""Writing of state dicts that torch.optim loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opt8bit.backends import Rule, as_real, stored_as
from opt8bit.optim import shards
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.offload import target
from opt8bit.optim.options import KEPT
from opt8bit.optim.states import check, initialized, will_be_coded
from opt8bit.quant import decode_state


@torch.no_grad()
def to_torch_state_dict(optimizer: Optimizer8bit) -> dict[str, Any]:
    """Returns the state dict that the optimizer's counterpart in torch.optim would have: float32 states, its groups.

    ``torch.optim.AdamW(params).load_state_dict(to_torch_state_dict(optimizer))`` then continues where an
    ``AdamW8bit`` of the same parameters is. The states are the exact values of their codes; what ``compensation``
    keeps of a parameter beyond its bfloat16 bits is left out.

    Args:
        optimizer: one with a ``counterpart``, stepped or not.

    Returns:
        New tensors where the states are, numbered as by :meth:`torch.optim.Optimizer.state_dict`.

    Raises:
        TypeError: the optimizer is none of opt8bit, or torch.optim has no counterpart.
        ValueError: a group has a hyper-parameter that the counterpart cannot honour; or a state is not of its
            parameter's shape, or was made with another block size.
    """
    counterpart = _counterpart(type(optimizer))
    defaults = getattr(torch.optim, counterpart)([torch.zeros(1, 1, device="cpu")]).defaults
    groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Tensor]] = {}
    first = 0
    for number, group in enumerate(optimizer.param_groups):
        groups.append(_group(optimizer, number, defaults, counterpart, first))
        rule, initial = optimizer.rule(group), optimizer.initial(group)
        for index, param in enumerate(group["params"], first):
            state = optimizer.state.get(param)
            stored = {each for name in rule.states for each in (name, *stored_as(name))}
            if state and (not rule.states or set(state) & stored):  # else it begins anew with momentum
                where, shard, state = f"parameter {index}", target(param, group), shards.local_states(state)
                state = initialized(where, state, rule, shard, group, will_be_coded(state, rule, param, group), initial)
                check(where, shard, rule, group, state)
                states[index] = shards.sharded(_state(shard, rule, group, state), param, group["block_size"])
            elif initial:  # states that torch's Adagrad makes in its constructor, and not when it steps
                begun = _initial(target(param, group), initial)
                states[index] = shards.sharded(begun, param, group["block_size"])
        first += len(group["params"])
    return {"state": {index: state for index, state in states.items() if state}, "param_groups": groups}


def _counterpart(kind: type[Any]) -> str:
    if not issubclass(kind, Optimizer8bit):
        raise TypeError(f"optimizer must be one of opt8bit, got {kind.__name__}")
    if kind.counterpart is None or not hasattr(torch.optim, kind.counterpart):
        raise TypeError(f"torch.optim has no counterpart of {kind.__name__}")
    return kind.counterpart


def _group(
    optimizer: Optimizer8bit, number: int, defaults: Mapping[str, Any], counterpart: str, first: int
) -> dict[str, Any]:
    """Returns a parameter group as the counterpart has it, with what users and schedulers have added."""
    group = optimizer.param_groups[number]
    kept = {name: value for name, value in group.items() if name not in KEPT and name != "params"}
    alien = [name for name in kept if name in optimizer.defaults and name not in defaults]
    for name in alien:
        if kept.pop(name):
            raise ValueError(f"parameter group {number}: torch.optim.{counterpart} has no {name}, got {group[name]!r}")
    _check_names(number, {name: value for name, value in kept.items() if name in defaults}, counterpart)
    copied = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in kept.items()}
    return {**defaults, **copied, "params": list(range(first, first + len(group["params"])))}


def _check_names(number: int, kept: Mapping[str, Any], counterpart: str) -> None:
    """Raises ValueError if this version of torch lacks a function that a group names, as Muon's adjust_lr_fn does.

    Only the constructor of torch's optimizer refuses an unknown name. A loaded one trains on as if none were given.
    """
    names = {name: value for name, value in kept.items() if isinstance(value, str)}
    try:
        getattr(torch.optim, counterpart)([torch.zeros(1, 1, device="cpu")], **names)
    except ValueError as error:
        message = f"parameter group {number}: torch.optim.{counterpart} of torch {torch.__version__}: {error}"
        raise ValueError(message) from error


def _state(param: Tensor, rule: Rule, group: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state of a parameter as the counterpart has it."""
    values = {name: _full(state, name, signed, group["block_size"]) for name, signed in rule.states.items()}
    if "variance" in values:
        square = as_real(values["grad_avg"]).square() + as_real(values["variance"])
        square = torch.view_as_complex(square) if param.is_complex() else square
        values = {"square_avg": square, **{name: value for name, value in values.items() if name != "variance"}}
    if not rule.torch_counts_steps:
        return values if state["step"] > 0 else {}  # before the first step, torch's SGD has no buffer
    return {"step": state["step"].clone(), **values}


def _full(state: Mapping[str, Tensor], name: str, signed: bool, block_size: int) -> Tensor:
    codes, scale = stored_as(name)
    if codes in state:
        return decode_state(state[codes], state[scale], signed, block_size)
    return state[name].clone()


def _initial(param: Tensor, initial: Mapping[str, float]) -> dict[str, Tensor]:
    full = torch.promote_types(param.dtype, torch.float32)
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for name, value in initial.items():
        number = complex(value, value) if param.is_complex() else value
        state[name] = torch.full(param.shape, number, dtype=full, device=param.device)
    return state
