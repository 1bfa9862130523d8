"""What a step of a parameter group works on, kept between steps for as long as it stays true.

A model may have thousands of small parameters, and looking each of them up costs more than updating it. So a plan
is made once, and each step only compares it with what it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_

import numpy
import torch
from torch import Tensor

from opt8bit.backends import ADDRESS, Backend, GroupUpdate, Rule, Tensors, backend_for, get
from opt8bit.quant import block_view, dynamic_map

CODEBOOKS = {signed: dynamic_map(signed) for signed in (False, True)}

Key = tuple[Rule, int, "bool | None"]  # rule, block_size, fused


class _Part:
    """Parameters of a group that one backend serves and whose states are stored alike, and their gradients."""

    def __init__(
        self, backend: Backend, update: GroupUpdate, indices: Sequence[int], grads: Sequence[Tensor], max_dim: int
    ) -> None:
        self.backend = backend
        self.update = update
        self.indices = indices
        self.tensors = Tensors(_columns(update), max_dim)
        self.max_dim = max_dim
        self.described = self.tensors.describe()
        self.grads_described = self._gather(grads).describe()

    def _gather(self, grads: Sequence[Tensor]) -> Tensors:
        return Tensors([grads[i] for i in self.indices], self.max_dim)

    def now(self, grads: Sequence[Tensor]) -> GroupUpdate | None:
        """The work of one step, or None where something has another dtype, shape, layout or device than before."""
        gathered = self._gather(grads)
        described, grads_described = self.tensors.describe(), gathered.describe()
        if not numpy.array_equal(described[:, ADDRESS + 1 :], self.described[:, ADDRESS + 1 :]):
            return None
        if not numpy.array_equal(grads_described[:, ADDRESS + 1 :], self.grads_described[:, ADDRESS + 1 :]):
            return None
        addresses = described[:, ADDRESS].reshape(len(self.indices), -1)
        addresses = numpy.insert(addresses, 1, grads_described[:, ADDRESS], axis=1)
        return self.update._replace(grads=gathered.tensors, addresses=addresses)


class Plan:
    """The batches of a group: parameters that one backend serves and whose states are stored alike.

    Args:
        key: rule, block size and ``fused`` of the group.
        params: those that have a gradient.
        grads: their gradients.
        state: the optimizer's; it has every state of the rule for each of ``params``.

    Raises:
        ValueError: ``fused=True`` and no compiled kernels can serve a parameter; or a state is not
            of the parameter's shape and dtype, or was made with another block size.
    """

    def __init__(
        self, key: Key, params: Sequence[Tensor], grads: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]]
    ) -> None:
        self.key = key
        self.params = list(params)  # the group's own list may change
        self.types = set(map(type, grads))
        self.states = _state_tensors(params, state)
        rule, block_size, fused = key
        indices: dict[tuple[Backend, torch.dtype, bool], list[int]] = {}
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            is_coded = any(f"{name}_absmax" in state[param] for name in rule.states)
            _check_states(param, state[param], rule, block_size, is_coded)
            indices.setdefault((_backend(param, grad, fused), param.dtype, is_coded), []).append(index)
        max_dim = max([2, *(tensor.dim() for tensor in params)])  # an absmax has 2
        self.parts = []
        for (backend, _, is_coded), part in indices.items():
            update = _group_update(rule, block_size, [params[i] for i in part], is_coded, state)
            self.parts.append(_Part(backend, update, part, grads, max_dim))

    def batches(
        self,
        key: Key,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Mapping[Tensor, dict[str, Tensor]],
        hyper: Mapping[str, float],
    ) -> list[tuple[Backend, GroupUpdate]] | None:
        """The work of one step, for the backends; None where a plan made from these would be another one."""
        if key != self.key or len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return None
        states = _state_tensors(params, state)
        if len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return None
        if set(map(type, grads)) != self.types:
            return None
        work = []
        for part in self.parts:
            update = part.now(grads)
            if update is None:
                return None
            work.append((part.backend, update._replace(hyper=hyper)))
        return work


def _state_tensors(params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    return [tensor for param in params for tensor in state[param].values()]


def _columns(update: GroupUpdate) -> list[Tensor]:
    """Of each parameter: itself, its step, its states and their absmaxes."""
    count = len(update.codebooks)
    coded = count if update.absmaxes else 0
    return [
        tensor
        for i, (param, step) in enumerate(zip(update.params, update.steps, strict=True))
        for tensor in (
            param,
            step,
            *update.states[i * count : (i + 1) * count],
            *update.absmaxes[i * coded : (i + 1) * coded],
        )
    ]


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
        addresses=numpy.empty((0, 0), numpy.int64),
    )
