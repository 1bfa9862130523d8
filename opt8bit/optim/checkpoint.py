"""Loading of state dicts: all of one is read, checked and stored as the optimizer would, before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt8bit.backends import COMPENSATION, Rule, stored_as
from opt8bit.optim import shards
from opt8bit.optim.dialects import Dialect, Group, Place, State, dialect_of, divided
from opt8bit.optim.groups import Policy, merged_group
from opt8bit.optim.offload import on_cpu
from opt8bit.optim.reading import Coded, Read, described
from opt8bit.optim.states import Spec, check_values, is_8bit, is_compensated, specs
from opt8bit.quant import block_view, encode_state

if TYPE_CHECKING:
    from opt8bit.optim.ruled import Ruled

StateDict = dict[str, Any]


@contextmanager
def reading(optimizer: Ruled, policy: Policy) -> Iterator[None]:
    """Lets torch.optim's own ``load_state_dict`` load what :func:`read` makes of a state dict, while it is open.

    The hooks are registered only now, so that hooks of the user's run before and after them and see plain tensors.
    """
    box = optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: read(optimizer, state_dict, policy))
    unbox = optimizer.register_load_state_dict_post_hook(_unbox, prepend=True)
    try:
        yield
    finally:
        box.remove()
        unbox.remove()


class _Boxed:
    """Wraps what was loaded, so that torch.optim does not cast it to its parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _unbox(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.value if isinstance(value, _Boxed) else value


@torch.no_grad()
def read(optimizer: Ruled, state_dict: StateDict, policy: Policy) -> StateDict:
    """Reads a state dict of any dialect as the optimizer's own.

    Its groups have the hyper-parameters of the saved ones. Its states are new tensors, boxed.

    Raises:
        TypeError: it is not a dict.
        ValueError: it does not belong to the optimizer; the message names the parameter and what was expected. Or it
            is refused by another process that has a part of the parameters.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    try:
        result = _read(optimizer, state_dict, policy)
    except Exception:
        shards.agree(params, False)
        raise
    if not shards.agree(params, True):
        raise ValueError("another process has refused its part of the state dict, and says why")
    return result


def _read(optimizer: Ruled, state_dict: StateDict, policy: Policy) -> StateDict:
    """Returns what :func:`read` returns on a single process."""
    saved_groups, saved_states = _sections(state_dict)
    params = _params_by_key(optimizer, saved_groups)
    strangers = [key for key in saved_states if key not in params]
    if strangers:
        raise ValueError(f"there is a state of a parameter {described(strangers[0])}, but no parameter group lists it")
    groups, states = [], {}
    refused: list[ValueError] = []
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        mine = {key: saved_states[key] for key in saved["params"] if key in saved_states}
        dialect = dialect_of(saved, list(mine.values()))
        try:
            hyper = dialect.hyper(optimizer.rule(group), saved)
            merged = merged_group(optimizer, group, hyper, dialect.unused, dialect.missing, policy)
            for param in group["params"]:
                optimizer.check_param(param, merged)
        except ValueError as error:
            raise ValueError(f"parameter group {number}: {error}") from None
        rule, others = optimizer.rule(merged), optimizer.every_state()
        for key, state in mine.items():
            where, param = params[key]
            try:
                stored = _read_state(where, param, rule, others, dialect, saved, merged, state) if state else {}
            except ValueError as error:  # later: all processes go through all parameters, as some are gathered
                refused.append(error)
                continue
            if stored:
                states[key] = {name: _Boxed(value) for name, value in stored.items()}
        groups.append(merged)
    if refused:
        raise refused[0]
    return {**state_dict, "state": states, "param_groups": groups}


def _sections(state_dict: StateDict) -> tuple[list[dict[str, Any]], dict[Hashable, dict[str, Any]]]:
    """Returns the groups and the states of a state dict.

    Raises:
        TypeError: it is not a dict.
        ValueError: it is not one with groups of parameters and states by parameter.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"a state dict must be a dict, got {type(state_dict).__name__}")
    for section, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(section), kind):
            found = type(state_dict[section]).__name__ if section in state_dict else "none"
            raise ValueError(f"a state dict must have a {kind.__name__} {section!r}, got {found}")
    groups, states = state_dict["param_groups"], state_dict["state"]
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"parameter group {number} must be a dict with a list 'params'")
        if not all(isinstance(key, (int, str)) for key in group["params"]):
            raise ValueError(f"parameter group {number}: 'params' must be numbers or names of parameters")
    for key, state in states.items():
        if not isinstance(state, dict):
            raise ValueError(f"the state of parameter {described(key)} must be a dict, got {type(state).__name__}")
    return groups, states


def _params_by_key(optimizer: Ruled, saved_groups: list[dict[str, Any]]) -> dict[Hashable, tuple[str, Tensor]]:
    """Returns the parameters of the optimizer, in words and themselves, by the keys that a state dict has for them.

    Raises:
        ValueError: there are not as many groups, or parameters of a group, or a key stands for two parameters.
    """
    groups = optimizer.param_groups
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state dict has {len(saved_groups)} parameter groups, the optimizer {len(groups)}")
    params: dict[Hashable, tuple[str, Tensor]] = {}
    first = 0
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        count = len(group["params"])
        if len(saved["params"]) != count:
            raise ValueError(
                f"parameter group {number} of the state dict has {len(saved['params'])} parameters, "
                f"the optimizer's {count}"
            )
        names = _names(number, group, saved)
        for i, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
            where = f"parameter {names[i]!r}" if names else f"parameter {first + i} (group {number}, number {i})"
            if key in params and params[key][1] is not param:
                raise ValueError(f"{where}: its key {key!r} stands for {params[key][0]}, too")
            params[key] = where, param
        first += count
    return params


def _names(number: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> Sequence[str]:
    """Returns the names of a group's parameters, if the state dict or the optimizer has them.

    Raises:
        ValueError: those of the state dict are not as many names.
    """
    if "param_names" not in saved:
        is_named = all(isinstance(key, str) for key in saved["params"])
        return saved["params"] if is_named else group.get("param_names", ())
    names = saved["param_names"]
    count = len(group["params"])
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) != count:
        raise ValueError(f"parameter group {number}: 'param_names' must be {count} names, got {described(names)}")
    return names


def _read_state(
    where: str,
    param: Tensor,
    rule: Rule,
    others: Collection[str],
    dialect: Dialect,
    saved: Group,
    merged: Mapping[str, Any],
    state: State,
) -> dict[str, Any]:
    """Returns the state of a parameter as the optimizer stores it, in tensors of its own; none where it begins again.

    What others keep beside it, such as slow weights, is kept as it is. What was saved of a sharded parameter is read
    shard by shard where it lies as the parameter does, in blocks of the same size; else as a whole, of which the shard
    is cut.

    Args:
        saved, merged: its group in the state dict, and as the optimizer will have it.

    Raises:
        ValueError: it is not one of the parameter.
    """
    state, beside = divided(state) if dialect.keeps_others else (state, {})
    beside = {name: _own_value(where, name, value, param) for name, value in beside.items()}
    by_shard = shards.is_sharded(param) and _is_placed_alike(param, saved, merged, state)
    if by_shard:
        target, state = shards.local(param), shards.shards_of(where, param, state)
    elif shards.is_sharded(param):
        target, state = shards.whole(param), {name: shards.everywhere(value) for name, value in state.items()}
    else:
        target = param
    if merged["offload"]:
        target = on_cpu(target)
    found = dialect.states(Place(where, target, rule, others), saved, state) if state else {}
    if not found:
        return beside
    stored = _stored(where, target, rule, merged, is_8bit(param, merged), found)
    if shards.is_sharded(param) and not by_shard:
        stored = shards.cut(stored, param)
    return {**shards.sharded(stored, param, merged["block_size"]), **beside}


def _own_value(where: str, name: str, value: Any, param: Tensor) -> Any:
    """Returns a copy of what others keep, on the parameter's device."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(param.device)
    try:
        return copy.deepcopy(value)
    except Exception as error:
        raise ValueError(f"{where}: state {name!r} cannot be copied: {error}") from None


def _is_placed_alike(param: Tensor, saved: Group, merged: Mapping[str, Any], state: State) -> bool:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    is_of_blocks = saved.get("block_size", merged["block_size"]) == merged["block_size"]
    return is_of_blocks and all(shards.placed_alike(value, param) for value in tensors)


def _stored(
    where: str, param: Tensor, rule: Rule, group: Mapping[str, Any], coded: bool, found: Read
) -> dict[str, Tensor]:
    """Returns what was found as the optimizer stores it, in tensors of its own.

    Raises:
        ValueError: a number that has no code; a compensation that is not one.
    """
    compensated, block_size = is_compensated(param, group), group["block_size"]
    parts: dict[str, Tensor] = {}
    for name, value in found.items():
        if coded and name in rule.codable:
            coded_parts = codes_of(where, name, value, block_size, rule.codable[name])
            parts |= zip(stored_as(name), coded_parts, strict=True)
        else:
            parts[name] = value.decoded() if isinstance(value, Coded) else value
    if compensated and COMPENSATION not in parts:
        parts[COMPENSATION] = torch.zeros((), dtype=torch.uint8, device="cpu")
    expected = specs(param, rule, group, coded)
    return {name: _own(parts[name], spec) for name, spec in expected.items()}


def codes_of(where: str, name: str, value: Tensor | Coded, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Returns a state in codes; bit for bit the same if it was in blocks of this size."""
    if isinstance(value, Coded):
        if value.view == block_view(value.codes.shape, block_size):
            return value.codes, value.scale
        value = value.decoded()
    check_values(f"{where}: state {name!r}", value, signed)
    return encode_state(value, signed, block_size)


def _own(tensor: Tensor, spec: Spec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device).copy_(tensor)
