"""How the states of a parameter are stored: which tensors there are, and what each of them must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opt8bit.backends import Rule, counts_on_device, keep_positive
from opt8bit.optim import shards
from opt8bit.quant import block_view, dynamic_map, quantize_blockwise

CODEBOOKS = {signed: dynamic_map(signed) for signed in (False, True)}
MIN_ROW_LENGTH = 16  # a shorter row's absmax would weigh more than its codes save
MIN_FLAT_LENGTH = 2**20  # a 1-D tensor as long as this is a flattened buffer, not a bias
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPENSATION = "compensation"  # what a bfloat16 parameter rounds away of its float32 bits; see `compensation_spec`


class Spec(NamedTuple):
    """What a state tensor must be; it is contiguous as well."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"of shape {tuple(self.shape)}, {self.dtype} and on {self.device}"


def spec_of(tensor: Tensor) -> Spec:
    return Spec(tensor.shape, tensor.dtype, tensor.device)


def is_8bit(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the states of a parameter in a group are stored as 8-bit codes.

    Raises:
        ValueError: the parameter's attribute ``state_bits`` is neither 8 nor 32.
    """
    return _has_blocks(param, group) and shards.keeps_blocks(param, group["block_size"])


def is_cut(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether states are stored in full only because the parameter's shards would cut their blocks."""
    return (
        shards.is_sharded(param) and _has_blocks(param, group) and not shards.keeps_blocks(param, group["block_size"])
    )


def _has_blocks(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether states are worth blocks: by the whole parameter, whoever has which part of it."""
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
    """Whether a parameter in a group keeps the bits that bfloat16 has no room for."""
    return bool(group["compensation"]) and param.dtype == torch.bfloat16


def is_coded(state: Mapping[str, Any], rule: Rule) -> bool:
    """Whether states that are there are stored as codes."""
    return any(f"{name}_absmax" in state for name in rule.states)


def will_be_coded(state: Mapping[str, Any], rule: Rule, param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether states are stored as codes: those that are there, and those that are added to them later."""
    if any(name in state for name in rule.states):
        return is_coded(state, rule)
    return is_8bit(param, group)


def coded_state(value: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a state, as a step stores it."""
    codes, absmax = quantize_blockwise(value, CODEBOOKS[signed], block_size)
    if not signed:
        keep_positive(codes, value)
    return codes, absmax


def compensation_spec(param: Tensor) -> Spec:
    """Of an int16 for each element as its two bytes: there is no int16 among what processes can send each other."""
    return Spec(torch.Size((*param.shape, 2)), torch.uint8, param.device)


def specs(param: Tensor, rule: Rule, group: Mapping[str, Any], coded: bool) -> dict[str, Spec]:
    """What there must be for a parameter in a group, by name, in the order of ``state[p]``."""
    full = torch.promote_types(param.dtype, torch.float32)
    is_counted_there = group["fused"] is not False and counts_on_device(param, rule)
    result = {"step": Spec(torch.Size(), torch.float32, param.device if is_counted_there else torch.device("cpu"))}
    for name in rule.states:
        result[name] = Spec(param.shape, torch.uint8 if coded else full, param.device)
        if coded:
            shape = torch.Size(block_view(param.shape, group["block_size"]).absmax_shape)
            result[f"{name}_absmax"] = Spec(shape, torch.float32, param.device)
    if is_compensated(param, group):
        result[COMPENSATION] = compensation_spec(param)
    return result


def initialized(
    state: Mapping[str, Tensor],
    rule: Rule,
    param: Tensor,
    group: Mapping[str, Any],
    coded: bool,
    initial: Mapping[str, float],
) -> dict[str, Tensor]:
    """The states of a parameter, or of a shard: those that are there, and what a rule needs and they lack.

    Args:
        coded: whether they are stored as codes.
        initial: what a state begins as, by name; zero for those that are not here.
    """
    result = dict(state)
    if rule.states and not any(name in state for name in rule.states):
        result.pop("step", None)  # of a rule without states: SGD's, before it was given momentum
    if not is_compensated(param, group):
        result.pop(COMPENSATION, None)  # of a time when it was: the parameter has moved since
    for name, spec in specs(param, rule, group, coded).items():
        if name in result:
            if name == "step" and isinstance(result[name], Tensor):
                result[name] = result[name].to(spec.device)  # from where another backend counted
            continue
        value: Any = initial.get(name.removesuffix("_absmax"), 0.0)
        if coded and name in rule.states:  # the absmax holds the value; the code is that of 1 or of 0
            value = int((CODEBOOKS[rule.states[name]] == (value != 0)).nonzero())
        if spec.dtype.is_complex:  # a pair of numbers
            value = complex(value, value)
        result[name] = torch.full(spec.shape, value, dtype=spec.dtype, device=spec.device)
    return result


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
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: state {name!r} must be a tensor, got {type(tensor).__name__}")
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(f"{where}: state {name!r} must be a plain tensor, got one of type {type(tensor).__name__}")
        if tensor.layout != torch.strided or spec_of(tensor) != spec or not tensor.is_contiguous():
            raise ValueError(
                f"{where}, of shape {tuple(param.shape)} and {param.dtype}: with block_size {group['block_size']}, "
                f"state {name!r} must be {spec} and contiguous, got one {spec_of(tensor)}, layout {tensor.layout} "
                f"and strides {tensor.stride() if tensor.layout == torch.strided else None}"
            )
