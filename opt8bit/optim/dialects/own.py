"""opt8bit's own dialect: states by the names of the rules, in full or as codes with an absmax."""

from __future__ import annotations

from collections.abc import Sequence

from opt8bit.optim.dialects.dialect import Dialect, Group, Place, State, family, refuse_unknown, value_of
from opt8bit.optim.reading import Read, check_tensor, described, read_coded, read_full, read_step
from opt8bit.optim.states import COMPENSATION, compensation_spec

STATELESS = ("sgd", "lars")  # families that have no states without momentum, and begin anew when they get some


def _is_own(group: Group, states: Sequence[State]) -> bool:
    return "block_size" in group


def _hyper(family: str, group: Group) -> Group:
    size = group["block_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"block_size must be a positive integer, got {described(size)}")
    return group


def _states(place: Place, group: Group, state: State) -> Read:
    names = {*place.rule.states, *place.others}
    refuse_unknown(place, state, {"step", COMPENSATION, *names, *(f"{name}_absmax" for name in names)})
    if place.rule.states and family(place.rule) in STATELESS and not set(state) & set(place.rule.states):
        return {}
    read: Read = {"step": read_step(place.where, value_of(place, state, "step"))}
    for name, signed in place.rule.states.items():
        value = value_of(place, state, name)
        if f"{name}_absmax" in state:
            absmax = state[f"{name}_absmax"]
            read[name] = read_coded(place.where, name, value, absmax, place.param, signed, group["block_size"])
        else:
            read[name] = read_full(place.where, name, value, place.param, signed)
    if COMPENSATION in state:
        spec = compensation_spec(place.param)
        read[COMPENSATION] = check_tensor(place.where, COMPENSATION, state[COMPENSATION], spec.shape, (spec.dtype,))
    return read


OWN = Dialect(_is_own, _hyper, _states, unused=("decoupled_weight_decay",), missing=("decoupled_weight_decay",))
