"""opt8bit's own dialect: states by the names of the rules, in full or as codes with scales, of now or of before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opt8bit.backends import COMPENSATION, Rule, stored_as
from opt8bit.optim.dialects.dialect import ADDED_LATER, Dialect, Group, Place, State, refuse_unknown, value_of
from opt8bit.optim.old_layout import is_old, old_absmax
from opt8bit.optim.reading import Coded, Read, check_tensor, described, read_coded, read_full, read_step
from opt8bit.optim.ruled import RULES
from opt8bit.optim.states import compensation_spec


def _is_own(group: Group, states: Sequence[State]) -> bool:
    return "block_size" in group


def _hyper(rule: Rule, group: Group) -> Group:
    size = group["block_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"block_size must be a positive integer, got {described(size)}")
    return group


def _states(place: Place, group: Group, state: State) -> Read:
    names = {*place.rule.states, *place.others}
    stored = {each for name in names for each in (name, *stored_as(name), old_absmax(name))}
    refuse_unknown(place, state, {"step", COMPENSATION, *stored})
    of_rule = {each for name in place.rule.states for each in (name, *stored_as(name))}
    can_be_without = any(not rule.states for rule in RULES.values() if rule.family == place.rule.family)
    if place.rule.states and can_be_without and not set(state) & of_rule:  # momentum that begins now
        return {}
    read: Read = {"step": read_step(place.where, value_of(place, state, "step"))}
    for name, signed in place.rule.states.items():
        read[name] = _state(place, name, signed, group["block_size"], state)
    if COMPENSATION in state:
        spec = compensation_spec(place.param)
        read[COMPENSATION] = check_tensor(place.where, COMPENSATION, state[COMPENSATION], spec.shape, (spec.dtype,))
    return read


def _state(place: Place, name: str, signed: bool, block_size: int, state: State) -> Tensor | Coded:
    """Reads one state: in codes, in the codes of the old layout, or in full, which wins over codes beside it."""
    codes, scale = stored_as(name)
    if is_old(state, name):
        values = value_of(place, state, name), state[old_absmax(name)]
        return read_coded(place.where, (name, old_absmax(name)), values, place.param, signed, block_size, is_old=True)
    if name not in state and (codes in state or scale in state):
        values = value_of(place, state, codes), value_of(place, state, scale)
        return read_coded(place.where, (codes, scale), values, place.param, signed, block_size)
    return read_full(place.where, name, value_of(place, state, name), place.param, signed)


OWN = Dialect(_is_own, _hyper, _states, unused=("decoupled_weight_decay",), missing=ADDED_LATER)
