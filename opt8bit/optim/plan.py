"""What a step of a parameter group works on, kept between steps for as long as it stays true.

A model may have thousands of small parameters, and looking each of them up costs more than updating it. So a plan
is made once, and each step only compares it with what it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from opt8bit.backends import ADDRESS, Backend, GroupUpdate, Rule, Tensors, backend_for, get
from opt8bit.optim.states import CODEBOOKS, COMPENSATION, check, is_coded, is_compensated
from opt8bit.quant import block_view

OPTIONS = ("block_size", "fused", "stochastic_rounding", "compensation", "seed")  # of a group, that plans depend on

State = Mapping[Tensor, dict[str, Tensor]]


class Work(NamedTuple):
    """What one backend does in one step, and the parameters that are written back from contiguous copies."""

    backend: Backend
    update: GroupUpdate
    copies: Sequence[tuple[Tensor, Tensor]]  # (parameter, contiguous copy)


class _Part:
    """Parameters of a group that one backend serves and that are stored alike.

    Args:
        update: of these parameters; its ``grads`` are those of now.
        indices: of the parameters among those of the plan.
        is_staged: the backend takes contiguous tensors of one dtype only, and these are not.
    """

    def __init__(self, backend: Backend, update: GroupUpdate, indices: Sequence[int], is_staged: bool) -> None:
        self.backend = backend
        self.update = update
        self.indices = indices
        self.is_staged = is_staged
        columns = _columns(update)
        self.width = len(columns) // len(indices)
        # An absmax has two dimensions; what gets more than there are now is noticed as a change.
        self.max_dim = max([2, *(param.dim() for param in update.params)])
        self.tensors = Tensors(columns, self.max_dim)
        self.described = self.tensors.describe()
        self.grads_described = Tensors(update.grads, self.max_dim).describe()

    def now(self, all_grads: Sequence[Tensor], hyper: Mapping[str, float], grad_scale: float) -> Work | None:
        """The work of one step, or None where a tensor has another dtype, shape, layout or device than before."""
        grads = [all_grads[i] for i in self.indices]
        described, grads_described = self.tensors.describe(), Tensors(grads, self.max_dim).describe()
        if not _is_alike(described, self.described) or not _is_alike(grads_described, self.grads_described):
            return None
        addresses = described[:, ADDRESS].reshape(-1, self.width)
        grad_addresses = grads_described[:, ADDRESS]
        params, copies = self.update.params, []
        if self.is_staged:
            grads = [grad.to(param.dtype).contiguous() for param, grad in zip(params, grads, strict=True)]
            staged = [param.contiguous() for param in params]
            copies = [pair for pair in zip(params, staged, strict=True) if pair[0] is not pair[1]]
            addresses = numpy.concatenate([_addresses(staged)[:, None], addresses[:, 1:]], axis=1)
            params, grad_addresses = staged, _addresses(grads)
        update = self.update._replace(
            hyper=hyper,
            grad_scale=grad_scale,
            params=params,
            grads=grads,
            addresses=numpy.insert(addresses, 1, grad_addresses, axis=1),
        )
        return Work(self.backend, update, copies)


class Plan:
    """The parts of a group: parameters that one backend serves and that are stored alike.

    Args:
        rule: of the group.
        group: the parameter group, for its ``OPTIONS``.
        params: those that have a gradient.
        grads: their gradients.
        numbers: of these parameters in the optimizer.
        state: the optimizer's; it has every state of the rule for each of ``params``.

    Raises:
        ValueError: ``fused=True`` and no compiled kernels can serve a parameter; or a state is not
            of the parameter's shape and dtype, or was made with another block size.
    """

    def __init__(
        self,
        rule: Rule,
        group: Mapping[str, Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        numbers: Sequence[int],
        state: State,
    ) -> None:
        self.key = _key(rule, group)
        self.params = list(params)  # the group's own list may change
        self.types = set(map(type, grads))
        self.states = _state_tensors(params, state)
        indices: dict[tuple[Backend, torch.dtype, bool, bool, bool], list[int]] = {}
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            check(f"parameter {numbers[index]}", param, rule, group, state[param])
            backend, is_staged = _backend(rule, param, grad, group["fused"])
            alike = (is_coded(state[param], rule), is_compensated(param, group))
            indices.setdefault((backend, param.dtype, is_staged, *alike), []).append(index)
        self.parts = []
        for (backend, _, is_staged, coded, compensated), part in indices.items():
            update = _group_update(
                rule,
                group,
                [params[i] for i in part],
                [grads[i] for i in part],
                [numbers[i] for i in part],
                state,
                coded,
                compensated,
            )
            self.parts.append(_Part(backend, update, part, is_staged))

    def work(
        self,
        rule: Rule,
        group: Mapping[str, Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: State,
        hyper: Mapping[str, float],
        grad_scale: float,
    ) -> list[Work] | None:
        """The work of one step; None where a plan made from these would be another one."""
        if _key(rule, group) != self.key or len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return None
        states = _state_tensors(params, state)
        if len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return None
        if set(map(type, grads)) != self.types:
            return None
        work = [part.now(grads, hyper, grad_scale) for part in self.parts]
        done = [item for item in work if item is not None]
        return done if len(done) == len(work) else None


def _key(rule: Rule, group: Mapping[str, Any]) -> tuple[Any, ...]:
    return rule, *(group[name] for name in OPTIONS)


def _state_tensors(params: Sequence[Tensor], state: State) -> list[Tensor]:
    return [tensor for param in params for tensor in state[param].values()]


def _is_alike(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    return numpy.array_equal(a[:, ADDRESS + 1 :], b[:, ADDRESS + 1 :])


def _addresses(tensors: Sequence[Tensor]) -> numpy.ndarray:
    return numpy.fromiter(map(Tensor.data_ptr, tensors), numpy.int64, len(tensors))


def _columns(update: GroupUpdate) -> list[Tensor]:
    """Of each parameter: itself, its step, its states, their absmaxes and its compensation."""
    columns = []
    for i, (param, step) in enumerate(zip(update.params, update.steps, strict=True)):
        columns += [param, step]
        for tensors in (update.states, update.absmaxes, update.compensations):
            each = len(tensors) // len(update.params)
            columns += tensors[i * each : (i + 1) * each]
    return columns


def _backend(rule: Rule, param: Tensor, grad: Tensor, fused: bool | None) -> tuple[Backend, bool]:
    """The backend that serves a parameter, and whether it takes a contiguous copy of it."""
    backend = backend_for(param.device)
    if fused is False or not backend.can_step(rule, param):
        backend = get("reference")
    if fused and backend.name == "reference":
        raise ValueError(
            f"fused=True, but no compiled kernels serve {rule.name} for a parameter of {param.dtype} on "
            f"{param.device}; leave fused out"
        )
    is_plain = param.is_contiguous() and grad.is_contiguous() and grad.dtype == param.dtype
    return backend, backend.name != "reference" and not is_plain


def _group_update(
    rule: Rule,
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    numbers: Sequence[int],
    state: State,
    coded: bool,
    compensated: bool,
) -> GroupUpdate:
    views = [block_view(param.shape, group["block_size"]) for param in params]
    names = [f"{name}_absmax" for name in rule.states] if coded else []
    rounding = "compensated" if compensated else "stochastic" if group["stochastic_rounding"] else "nearest"
    return GroupUpdate(
        rule=rule,
        hyper={},
        block_size=group["block_size"],
        rounding=rounding,
        seed=group["seed"],
        grad_scale=1.0,
        params=params,
        grads=grads,
        numbers=numpy.array(numbers, numpy.int64),
        steps=[state[param]["step"] for param in params],
        views=views,
        extents=numpy.array([(view.rows, view.row_length) for view in views], numpy.int64),
        states=[state[param][name] for param in params for name in rule.states],
        absmaxes=[state[param][name] for param in params for name in names],
        compensations=[state[param][COMPENSATION] for param in params] if compensated else [],
        codebooks=[CODEBOOKS[signed] for signed in rule.states.values()],
        addresses=numpy.empty((0, 0), numpy.int64),
    )
