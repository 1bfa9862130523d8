"""Defines a dialect: a form of state dict that can be loaded, read into the names of our rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from opt8bit.backends import COMPENSATION, Rule, stored_as
from opt8bit.optim.old_layout import old_absmax
from opt8bit.optim.reading import Read, described

Group = Mapping[str, Any]  # as it was saved
State = Mapping[Any, Any]  # of one parameter, as it was saved


class Place(NamedTuple):
    """Names the parameter whose state is read, and what is known of it."""

    where: str  # the parameter, in words
    param: Tensor
    rule: Rule
    others: Collection[str]  # states that the optimizer has with other hyper-parameters: they may lie about


# Hyper-parameters that state dicts of some time lack: the optimizer's own are taken then, as torch does.
ADDED_LATER = ("amsgrad", "maximize", "decoupled_weight_decay", "nesterov", "momentum", "centered", "caution")

# The states of every optimizer whose state dicts are told apart. What has another name is not an optimizer's, but of
# something around it, such as the slow weights of Lookahead.
OPTIMIZERS_OWN = (
    *(
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_avg_slow",
        "momentum_buffer",
        "square_avg",
        "variance",
        "grad_avg",
        "z",
    ),
    *("sum", "exp_inf", "mu_product", "acc_delta", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"),
)
NOT_OTHERS = {
    *("step", COMPENSATION, *OPTIMIZERS_OWN),
    *(stored for name in OPTIMIZERS_OWN for stored in (*stored_as(name), old_absmax(name))),
}


class Dialect(NamedTuple):
    """A form of state dict. Both readers raise ValueError for what cannot be one."""

    is_of: Callable[[Group, Sequence[State]], bool]  # whether a group and its states have it
    hyper: Callable[[Rule, Group], Group]  # (a rule of the optimizer, group) -> the group, in our names
    states: Callable[[Place, Group, State], Read]  # of an optimizer's own; empty where it begins anew
    unused: Collection[str]  # hyper-parameters that are dropped where the optimizer has none of that name
    missing: Collection[str]  # hyper-parameters that it may lack: the optimizer keeps its own
    keeps_others: bool = True  # what others have put among the states is loaded, too


def value_of(place: Place, state: State, name: str) -> Any:
    """Raises ValueError where a state is missing."""
    if name not in state:
        raise ValueError(f"{place.where}, of shape {tuple(place.param.shape)}, lacks the state {name!r}")
    return state[name]


def refuse_unknown(place: Place, state: State, known: Collection[str]) -> None:
    """Raises ValueError where there is a state of another optimizer, or of none."""
    for name in state:
        if name not in known:
            expected = ", ".join(["step", *place.rule.states])
            raise ValueError(f"{place.where} has a state {described(name)}, but {place.rule.name} has {expected}")


def divided(state: State) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Returns what of a state is an optimizer's own, and what others have put beside it."""
    beside = {name: value for name, value in state.items() if isinstance(name, str) and name not in NOT_OTHERS}
    return {name: value for name, value in state.items() if name not in beside}, beside
