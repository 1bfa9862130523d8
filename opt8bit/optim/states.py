"""Defines how the states of a parameter are stored: which tensors there are, and what each of them must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opt8bit.backends import COMPENSATION, Rule, counts_on_device, stored_as
from opt8bit.optim import shards
from opt8bit.quant import block_view, encode_state, state_map

MIN_ROW_LENGTH = 16  # a shorter row's absmax would weigh more than its codes save
MIN_FLAT_LENGTH = 2**20  # a 1-D tensor as long as this is a flattened buffer, not a bias
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FSDP1_MARK = "_fsdp_flattened"  # an attribute of the parameters that FSDP1 flattens and cuts anywhere


WAY_OUT = (
    ". Who changes a parameter's shape changes its states: put them in full, of the new shape, under their names in "
    "torch.optim into state[p], and they are coded again; or delete state[p], and they begin at zero"
)


class Spec(NamedTuple):
    """Describes what a state tensor must be; it is contiguous as well."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"of shape {tuple(self.shape)}, {self.dtype} and on {self.device}"


def spec_of(tensor: Tensor) -> Spec:
    return Spec(tensor.shape, tensor.dtype, tensor.device)


def is_8bit(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Tells whether the states of a parameter in a group are stored as 8-bit codes.

    Raises:
        ValueError: the parameter's attribute ``state_bits`` is neither 8 nor 32.
    """
    return _has_blocks(param, group) and not _is_marked(param) and shards.keeps_blocks(param, group["block_size"])


def is_flattened(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Tells whether states are stored in full only because FSDP1 has flattened the parameter."""
    return _is_marked(param) and _has_blocks(param, group)


def is_cut(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Tells whether states are stored in full only because the parameter's shards would cut their blocks."""
    if _is_marked(param) or not shards.is_sharded(param):
        return False
    return _has_blocks(param, group) and not shards.keeps_blocks(param, group["block_size"])


def _is_marked(param: Tensor) -> bool:
    return getattr(param, FSDP1_MARK, False)


def _has_blocks(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Tells whether states are worth blocks: by the whole parameter, whoever has which part of it."""
    bits = getattr(param, "state_bits", group["state_bits"])
    if bits not in (8, 32):
        raise ValueError(f"state_bits must be 8 or 32, got {bits!r} as an attribute of a parameter")
    if bits == 32 or param.dtype not in CODED_DTYPES:
        return False
    if param.numel() < max(group["min_8bit_size"], 1):
        return False
    if param.dim() < 2:
        return param.numel() >= MIN_FLAT_LENGTH
    return param.numel() // param.shape[0] >= MIN_ROW_LENGTH


def is_compensated(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Tells whether a parameter in a group keeps the bits that bfloat16 has no room for."""
    return bool(group["compensation"]) and param.dtype == torch.bfloat16


def is_coded(state: Mapping[str, Any], rule: Rule) -> bool:
    """Tells whether states that are there are stored as codes."""
    return any(stored in state for name in rule.states for stored in stored_as(name))


def will_be_coded(state: Mapping[str, Any], rule: Rule, param: Tensor, group: Mapping[str, Any]) -> bool:
    """Tells whether states are stored as codes: those that are there, and those that are added to them later.

    Where someone has put all of them in full beside their codes, it is decided again, as for new ones.
    """
    in_full = [name for name in rule.codable if name in state]
    if is_coded(state, rule):
        return len(in_full) < len(rule.codable) or is_8bit(param, group)
    return not in_full and is_8bit(param, group)


def compensation_spec(param: Tensor) -> Spec:
    """Returns the spec of an int16 for each element as its two bytes, as processes cannot send each other int16."""
    return Spec(torch.Size((*param.shape, 2)), torch.uint8, param.device)


def specs(param: Tensor, rule: Rule, group: Mapping[str, Any], coded: bool) -> dict[str, Spec]:
    """Returns what there must be for a parameter in a group, by name, in the order of ``state[p]``."""
    full = torch.promote_types(param.dtype, torch.float32)
    is_counted_there = group["fused"] is not False and counts_on_device(param, rule)
    result = {"step": Spec(torch.Size(), torch.float32, param.device if is_counted_there else torch.device("cpu"))}
    for name in rule.states:
        if coded and name in rule.codable:
            codes, scale = stored_as(name)
            shape = torch.Size(block_view(param.shape, group["block_size"]).absmax_shape)
            result[codes] = Spec(param.shape, torch.uint8, param.device)
            result[scale] = Spec(shape, torch.float32, param.device)
        else:
            result[name] = Spec(param.shape, full, param.device)
    if is_compensated(param, group):
        result[COMPENSATION] = compensation_spec(param)
    return result


def initialized(
    where: str,
    state: Mapping[str, Any],
    rule: Rule,
    param: Tensor,
    group: Mapping[str, Any],
    coded: bool,
    initial: Mapping[str, float],
) -> dict[str, Tensor]:
    """Returns the states of a parameter, or of a shard: those that are there, and what a rule needs and they lack.

    Args:
        where: the parameter, in words.
        coded: whether they are stored as codes.
        initial: what a state begins as, by name; zero for those that are not here.

    Raises:
        ValueError: a state that stands in full beside codes cannot be coded.
    """
    present = {**state, **(_coded_again(where, state, rule, param, group) if coded else {})}
    if rule.states and not any(stored in present for name in rule.states for stored in (name, *stored_as(name))):
        present.pop("step", None)  # of a rule without states: SGD's, before it was given momentum
    first_values = _first_values(rule, coded, initial, param.is_complex())
    result = {}
    for name, spec in specs(param, rule, group, coded).items():
        if name not in present and name in rule.iterates:
            result[name] = param.detach().to(spec.dtype, copy=True, memory_format=torch.contiguous_format)
        elif name not in present:
            value = first_values.get(name, 0)
            result[name] = torch.full(spec.shape, value, dtype=spec.dtype, device=spec.device)
        elif isinstance(present[name], Tensor) and (name == "step" or group["offload"]):
            # Another backend counted elsewhere; someone has moved offloaded states to the parameters' device.
            result[name] = present[name].to(spec.device)
        else:
            result[name] = present[name]
    return result


def others(state: Mapping[str, Any], rule: Rule, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what lies among a parameter's states and is not the rule's.

    States in full that were coded again are not among them, nor codes that were superseded, nor a compensation of a
    time when there was one: the parameter has moved since.
    """
    gone = {COMPENSATION, *(stored for name in rule.states for stored in (name, *stored_as(name)))}
    return {name: value for name, value in state.items() if name not in found and name not in gone}


def _first_values(rule: Rule, coded: bool, initial: Mapping[str, float], is_complex: bool) -> dict[str, Any]:
    """Returns what fills the stored tensors of states that do not begin at zero."""
    result: dict[str, Any] = {}
    for name, value in initial.items():
        if coded:  # the scale holds the value; every code is that of 1
            codes, scale = stored_as(name)
            result[codes], result[scale] = int((state_map(rule.states[name]) == 1).nonzero()), value
        else:
            result[name] = complex(value, value) if is_complex else value
    return result


def _coded_again(
    where: str, state: Mapping[str, Any], rule: Rule, param: Tensor, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Codes states that someone has put there in full, under their names in torch.optim, beside codes.

    Gaussian splatting does so when it resets the opacity, and masks and pruning may.

    Raises:
        ValueError: one is not dense, finite, and of the parameter's shape; or is negative where it cannot be.
    """
    result = {}
    for name, signed in rule.codable.items():
        if name not in state:
            continue
        value = state[name]
        label = f"{where}: state {name!r}, put beside codes,"
        if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value) or not value.is_floating_point():
            raise ValueError(f"{label} must be a plain tensor of real numbers, got {_kind(value)}")
        if value.layout != torch.strided or value.shape != param.shape:
            raise ValueError(
                f"{label} must be dense and have shape {tuple(param.shape)}, "
                f"got {value.layout} and {tuple(value.shape)}"
            )
        check_values(label, value, signed)
        codes, scale = stored_as(name)
        value = value.detach().to(param.device, torch.float32)
        result[codes], result[scale] = encode_state(value, signed, group["block_size"])
    return result


def check_values(label: str, value: Tensor, signed: bool) -> None:
    """Raises ValueError where a state cannot be stored as codes."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{label} must be finite to be stored in 8 bits")
    if not signed and bool((value < 0).any()):
        raise ValueError(f"{label} must not be negative, got {value.min().item()}")


def check(where: str, param: Tensor, rule: Rule, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuses states that do not belong to a parameter as it is: kernels would read past their ends.

    Raises:
        ValueError: a state is missing, is not a tensor, or not what :func:`specs` says.
    """
    expected = specs(param, rule, group, is_coded(state, rule))
    for name, spec in expected.items():
        tensor = state.get(name)
        if tensor is None:
            raise ValueError(f"{where}, of shape {tuple(param.shape)}, lacks the state {name!r}")
        if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor):
            raise ValueError(f"{where}: state {name!r} must be a plain tensor, got {_kind(tensor)}")
        if tensor.layout != torch.strided or spec_of(tensor) != spec or not tensor.is_contiguous():
            raise ValueError(
                f"{where}, of shape {tuple(param.shape)} and {param.dtype}: with block_size {group['block_size']}, "
                f"state {name!r} must be {spec} and contiguous, got one {spec_of(tensor)}, layout {tensor.layout} "
                f"and strides {tensor.stride() if tensor.layout == torch.strided else None}{WAY_OUT}"
            )


def _kind(value: object) -> str:
    dtype = f" of {value.dtype}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{dtype}"
