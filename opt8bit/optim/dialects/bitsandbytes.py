"""bitsandbytes' dialect: ``state1`` and ``state2``, in float32 or as codes in blocks of the flattened tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.dialects.dialect import Dialect, Group, Place, State, refuse_unknown, value_of
from opt8bit.optim.reading import (
    REAL_DTYPES,
    Read,
    check_absmax,
    check_not_negative,
    check_tensor,
    described,
    read_step,
)
from opt8bit.optim.ruled import RULES
from opt8bit.quant import dequantize_blockwise

NESTED = "__bnb_optimizer_quant_state__"  # where all tensors are; older versions have them beside the step
NORMS = ("unorm_vec", "gnorm_vec")  # of the last step: nothing that the next one needs
BLOCK_SIZES = (256, 2048)  # now, and in older versions
CODING_ERROR = 2**-15  # in units of absmax: a cell of the table of 65,536 that it codes by


def _is_bitsandbytes(group: Group, states: Sequence[State]) -> bool:
    if any(states):
        return any(NESTED in state or "state1" in state for state in states)
    return {"betas", "eps"} <= set(group) and not {"amsgrad", "foreach"} & set(group)


def _hyper(rule: Rule, group: Group) -> Group:
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or not betas:
        raise ValueError(f"betas must be numbers, got {described(betas)}")
    return {**group, **{name: read(group) for name, read in rule.bitsandbytes_hyper.items()}}


def _states(place: Place, group: Group, state: State) -> Read:
    where, rule = place.where, place.rule
    slots = rule.bitsandbytes
    if not slots:
        loadable = [each for each in RULES.values() if each.bitsandbytes]
        nearest_first = sorted(loadable, key=lambda each: (each.family != rule.family, each.name))
        known = ", ".join(each.name for each in nearest_first)
        raise ValueError(f"{where}: states of bitsandbytes can be loaded for {known}, not for {rule.name}")
    nested = state.get(NESTED, {})
    if not isinstance(nested, dict):
        raise ValueError(f"{where}: state {NESTED!r} must be a dict, got {type(nested).__name__}")
    state = {**{name: value for name, value in state.items() if name != NESTED}, **nested}
    keys = [f"{key}{number}" for number in range(1, len(slots) + 1) for key in ("state", "qmap", "absmax")]
    refuse_unknown(place, state, {"step", *keys, *NORMS})
    read: Read = {"step": read_step(where, value_of(place, state, "step"))}
    for number, names in enumerate(slots, 1):
        stacked = _slot(place, state, number, len(names), signed=rule.states[names[0]])
        read |= zip(names, stacked, strict=True)
    return read


def _slot(place: Place, state: State, number: int, count: int, signed: bool) -> Tensor:
    """Returns what ``state1`` or ``state2`` holds: (count, *shape of the parameter), of full precision."""
    name, shape = f"state{number}", place.param.shape
    if place.param.is_complex():
        raise ValueError(f"{place.where}: state {name!r} must be complex as the parameter is")
    is_coded = f"absmax{number}" in state or f"qmap{number}" in state
    stacked_shape = shape if count == 1 else torch.Size((count, *shape))
    dtypes = (torch.uint8,) if is_coded else REAL_DTYPES
    stacked = check_tensor(place.where, name, value_of(place, state, name), stacked_shape, dtypes)
    stacked = stacked.to(place.param.device).reshape(count, *shape)
    if is_coded:
        stacked = _decoded(place, state, number, stacked, signed)
    elif not signed:
        check_not_negative(place.where, name, stacked)
    return stacked.to(torch.promote_types(place.param.dtype, torch.float32))


def _decoded(
    place: Place,
    state: State,
    number: int,
    codes: Tensor,  # (count, *shape of the parameter)
    signed: bool,
) -> Tensor:
    where, count, numel = place.where, codes.shape[0], place.param.numel()
    codebook = check_tensor(
        where, f"qmap{number}", value_of(place, state, f"qmap{number}"), torch.Size([256]), REAL_DTYPES[:1]
    )
    name = f"absmax{number}"
    value = value_of(place, state, name)
    sizes = {-(-numel // size): size for size in reversed(BLOCK_SIZES)}  # by the number of blocks
    blocks = value.shape[-1] if isinstance(value, Tensor) and not value.is_nested and value.dim() else 0
    blocks = blocks if blocks in sizes else -(-numel // BLOCK_SIZES[0])
    shape = torch.Size([blocks] if count == 1 else [count, blocks])
    absmax = check_tensor(where, name, value, shape, REAL_DTYPES[:1])
    check_absmax(where, name, absmax)
    try:
        values = dequantize_blockwise(
            codes.reshape(count, numel),
            absmax.reshape(count, blocks).to(codes.device),
            codebook,
            sizes[blocks],
        )
    except ValueError as error:
        raise ValueError(f"{where}: state 'qmap{number}': {error}") from None
    if not signed and numel:
        check_not_negative(where, f"state{number}", values + CODING_ERROR * float(absmax.max()))
        values.clamp_(min=0)
    return values.reshape(codes.shape)


BITSANDBYTES = Dialect(
    _is_bitsandbytes,
    _hyper,
    _states,
    unused=("betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3"),
    missing=(
        *("maximize", "caution", "amsgrad", "decoupled_weight_decay", "dampening", "nesterov", "momentum", "centered"),
        *("lr_decay", "initial_accumulator_value", "bias_correction", "adapt", "trust_coefficient"),
    ),
    keeps_others=False,
)
