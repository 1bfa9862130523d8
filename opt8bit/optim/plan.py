"""What a step of a parameter group works on, kept between steps for as long as it stays true.

A model may have thousands of small parameters, and looking each of them up costs more than updating it. So a plan
is made once, and each step only compares it with what it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from opt8bit.backends import Backend, GroupUpdate, Rule, backend_for, get
from opt8bit.quant import block_view, dynamic_map

CODEBOOKS = {signed: dynamic_map(signed) for signed in (False, True)}

Key = tuple[Rule, int, "bool | None"]  # rule, block_size, fused


class Signature(NamedTuple):
    """What a plan depends on in the parameters and gradients of a group, besides who they are."""

    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    is_dense: list[bool]


def signature(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Signature:
    tensors = [*params, *grads]
    return Signature(
        list(map(attrgetter("shape"), tensors)),
        list(map(attrgetter("dtype"), tensors)),
        [tensor.layout is torch.strided and tensor.is_contiguous() for tensor in tensors],
    )


class Plan:
    """The batches of a group: parameters that one backend serves and whose states are stored alike.

    Args:
        key: rule, block size and ``fused`` of the group.
        signature: of the parameters and their gradients.
        params: those that have a gradient.
        grads: their gradients.
        state: the optimizer's; it has every state of the rule for each of ``params``.

    Raises:
        ValueError: ``fused=True`` and no compiled kernels can serve a parameter; or a state is not
            of the parameter's shape and dtype, or was made with another block size.
    """

    def __init__(
        self,
        key: Key,
        signature: Signature,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Mapping[Tensor, dict[str, Tensor]],
    ) -> None:
        self.key = key
        self.signature = signature
        self.params = params
        self.tensors = _state_tensors(params, state)
        rule, block_size, fused = key
        indices: dict[tuple[Backend, bool], list[int]] = {}
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            is_coded = any(f"{name}_absmax" in state[param] for name in rule.states)
            _check_states(param, state[param], rule, block_size, is_coded)
            indices.setdefault((_backend(param, grad, fused), is_coded), []).append(index)
        self.parts = []
        for (backend, is_coded), part in indices.items():
            update = _group_update(rule, block_size, [params[i] for i in part], is_coded, state)
            self.parts.append((backend, part, update))

    def holds(
        self, key: Key, signature: Signature, params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]]
    ) -> bool:
        """Whether a plan made from these would be this one."""
        if key != self.key or len(params) != len(self.params) or signature != self.signature:
            return False
        if not all(map(is_, params, self.params)):
            return False
        tensors = _state_tensors(params, state)
        return len(tensors) == len(self.tensors) and all(map(is_, tensors, self.tensors))

    def batches(self, grads: Sequence[Tensor], hyper: Mapping[str, float]) -> list[tuple[Backend, GroupUpdate]]:
        """The work of one step, for the backends."""
        return [
            (backend, update._replace(hyper=hyper, grads=[grads[i] for i in part]))
            for backend, part, update in self.parts
        ]


def _state_tensors(params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    return [tensor for param in params for tensor in state[param].values()]


def _backend(param: Tensor, grad: Tensor, fused: bool | None) -> Backend:
    if fused is False:
        return get("reference")
    backend = backend_for(param.device)
    if backend.name != "reference" and not backend.can_step(param, grad):
        backend = get("reference")
    if fused and backend.name == "reference":
        raise ValueError(
            "fused=True, but no compiled kernels serve a parameter of "
            f"{param.dtype}, shape {tuple(param.shape)} and strides {param.stride()} on {param.device} with a "
            f"gradient of {grad.dtype} and strides {grad.stride()}; leave fused out"
        )
    return backend


def _check_states(param: Tensor, state: Mapping[str, Tensor], rule: Rule, block_size: int, is_coded: bool) -> None:
    """Refuses states that do not belong to the parameter as it is now: the kernels would read past their ends."""
    value_dtype = torch.uint8 if is_coded else torch.promote_types(param.dtype, torch.float32)
    expected = {"step": (torch.Size(), torch.float32, torch.device("cpu"))}
    for name in rule.states:
        expected[name] = (param.shape, value_dtype, param.device)
        if is_coded:
            shape = torch.Size(block_view(param.shape, block_size).absmax_shape)
            expected[f"{name}_absmax"] = (shape, torch.float32, param.device)
    for name, (shape, dtype, device) in expected.items():
        tensor = state.get(name)
        if tensor is None:
            raise ValueError(f"the state of a parameter of shape {tuple(param.shape)} has no {name!r}")
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device) or not tensor.is_contiguous():
            raise ValueError(
                f"with block_size {block_size}, state {name!r} of a parameter of shape {tuple(param.shape)} and "
                f"{param.dtype} must be contiguous, of shape {tuple(shape)} and {dtype} on {device}, got "
                f"{tuple(tensor.shape)} and {tensor.dtype} on {tensor.device}: neither may change during training"
            )


def _group_update(
    rule: Rule,
    block_size: int,
    params: Sequence[Tensor],
    is_coded: bool,
    state: Mapping[Tensor, dict[str, Tensor]],
) -> GroupUpdate:
    views = [block_view(param.shape, block_size) for param in params]
    names = [f"{name}_absmax" for name in rule.states] if is_coded else []
    return GroupUpdate(
        rule=rule,
        hyper={},
        block_size=block_size,
        params=params,
        grads=[],
        steps=[state[param]["step"] for param in params],
        views=views,
        extents=numpy.array([(view.rows, view.row_length) for view in views], numpy.int64),
        states=[state[param][name] for param in params for name in rule.states],
        absmaxes=[state[param][name] for param in params for name in names],
        codebooks=[CODEBOOKS[signed] for signed in rule.states.values()],
    )
