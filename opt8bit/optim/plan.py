"""Keeps what a step works on between steps, for as long as it stays true.

A model may have thousands of small parameters and hundreds of groups, and looking each of them up costs more than
updating it. So a plan is made once, for all groups together, and each step only compares it with what it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import methodcaller
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from opt8bit.backends import (
    ADDRESSES,
    COMPENSATION,
    Backend,
    Batch,
    Description,
    Rule,
    Step,
    data_ptrs,
    stored_as,
)
from opt8bit.optim.absent import absent, with_stand_ins
from opt8bit.optim.asked import Asked, backend_of
from opt8bit.optim.in_memory import is_staged, positions_of_channels
from opt8bit.optim.overlap import overlapping
from opt8bit.optim.shards import first_element
from opt8bit.optim.states import check, is_coded, is_compensated
from opt8bit.optim.usual import Usual
from opt8bit.quant import block_view, state_map

States = Sequence[Mapping[str, Tensor]]  # of the parameters of a plan
CODEBOOKS = {signed: state_map(signed) for signed in (False, True)}


class _Each(NamedTuple):
    """A parameter as a plan sees it."""

    group: int  # among those asked for
    i: int  # among the parameters of its group
    param: Tensor
    grad: Tensor
    owner: Tensor
    state: Mapping[str, Tensor]


class _Kind(NamedTuple):
    """Says which batch a parameter goes into: those of one kind and group go together."""

    group: int
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    coded: bool
    compensated: bool


class _Share(NamedTuple):
    """Lists what one backend has to step, batch after batch."""

    backend: Backend
    indices: list[int] | None  # n: of its parameters among all; None if it has all of them, in their order
    groups: list[int]  # of each batch, among those asked for
    staged: list[int]  # of those among the n that it takes contiguous copies of
    places: NDArray[numpy.int64]  # (n, words of ADDRESSES): the tensor among all that has each address
    addresses: NDArray[numpy.int64]  # alike: where those are in a step
    batches: list[Batch]
    prepared: Any  # what the backend made of them


class Plan:
    """Divides the parameters of some groups among the backends.

    Args:
        asked: of the step that the plan is made for; its gradients are not kept.
        states: every state of the rule for each of the parameters, group after group.

    Attributes:
        has_overlaps: whether parameters share memory, which are then to be stepped one group after another.
        usual: by what a step is known that needs no other plan, if there is such a step.

    Raises:
        RuntimeError: several elements of a parameter are one number in memory.
        ValueError: ``fused=True`` and no compiled kernels can serve a parameter, or ``capturable=True`` and no kernels
            can that never wait for the device; or a state is not of the parameter's shape and dtype, or was made with
            another block size.
    """

    def __init__(self, asked: Sequence[Asked], states: States) -> None:
        self._key = [each.key() for each in asked]
        every = _every(asked, states)
        self._stored = [tuple(state) for state in states]
        self._names = [_names(asked[each.group], each) for each in every]
        self._has_others = any(
            set(stored) != set(names) for stored, names in zip(self._stored, self._names, strict=True)
        )
        if not self._has_others:
            self._names = self._stored
        self._sizes = [len(stored) for stored in self._stored]
        self.has_overlaps = len(asked) > 1 and bool(overlapping([each.param for each in every]))
        first = 2 * len(every) + numpy.cumsum([0, *map(len, self._names)])
        self._steps_at = [int(at) + names.index("step") for at, names in zip(first, self._names, strict=False)]
        self._shares = _divided(asked, every, self._names, first)
        everything = range(len(every))
        fixed = [share.indices or everything for share in self._shares if not share.backend.can_skip()]
        self._cannot_skip = set(chain.from_iterable(fixed))
        is_direct = not (self.has_overlaps or any(share.staged for share in self._shares))
        self.usual = Usual.of(asked) if is_direct else None
        params = [each.param for each in every]
        tensors = self._tensors(params, [each.grad for each in every], states)
        assert tensors is not None
        self._description = Description(tensors)
        self._params_at = data_ptrs(params).tobytes()  # those that come to share memory need another plan

    def is_for(self, asked: Sequence[Asked]) -> bool:
        """Tells whether a plan made for what is asked would be this one, by all but the tensors."""
        return [each.key() for each in asked] == self._key

    def steps(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        hyper: Sequence[Mapping[str, Any]],  # of each group
        states: States,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[tuple[Backend, Step]] | None:
        """Returns the share of each backend in one step, or None where a plan made for these would be another one."""
        n, missing = len(params), absent(grads)
        if not self._cannot_skip.isdisjoint(missing):
            return None
        tensors = self._tensors(params, with_stand_ins(params, grads) if missing else grads, states)
        alike = [(n + i, i) for i in missing]
        try:
            found = None if tensors is None else self._description.addresses(tensors, alike)
        except AttributeError:  # what lies among the states is no tensor
            return None
        if found is None or found[:n].tobytes() != self._params_at:
            return None
        found[[self._steps_at[i] for i in missing]] = 0
        return [
            (share.backend, _step(share, params, grads, states, hyper, found, grad_scale, found_inf))
            for share in self._shares
        ]

    def _tensors(self, params: list[Tensor], grads: Sequence[Any], states: States) -> list[Tensor] | None:
        """Returns the parameters, their gradients, then the states of the first of them, of the second, ...

        None where not the same states are there, as where someone has put one in full beside its codes.
        """
        if list(map(len, states)) != self._sizes:
            return None
        if self._has_others:
            if list(map(tuple, states)) != self._stored:
                return None
            of_states = [state[name] for state, names in zip(states, self._names, strict=True) for name in names]
        else:
            of_states = list(chain.from_iterable(map(methodcaller("values"), states)))
        return [*params, *grads, *of_states]


def _every(asked: Sequence[Asked], states: States) -> list[_Each]:
    remaining = iter(states)
    # A gradient that is not there yet will most likely lie as its parameter does.
    grads = [with_stand_ins(map(Tensor.detach, each.params), each.grads) for each in asked]
    return [
        _Each(group, i, each.params[i], grads[group][i], each.owners[i], next(remaining))
        for group, each in enumerate(asked)
        for i in range(len(each.params))
    ]


def _names(asked: Asked, each: _Each) -> tuple[str, ...]:
    """Returns the names of what a step reads and writes among a parameter's states."""
    rule = asked.rule
    coded = rule.codable if is_coded(each.state, rule) else {}
    stored = chain.from_iterable(stored_as(name) if name in coded else (name,) for name in rule.states)
    return ("step", *stored, *([COMPENSATION] if is_compensated(each.param, asked.group) else []))


def _divided(
    asked: Sequence[Asked],
    every: Sequence[_Each],
    names: Sequence[Sequence[str]],
    first: NDArray[numpy.int64],  # place of each one's first state among all tensors, then where all end
) -> list[_Share]:
    """Divides parameters among the backends, each of which gets those of one kind together.

    Those whose rule has a kernel are apart from those whose has none, as torch computes the whole share then.
    """
    shared_within = [overlapping(each.params) for each in asked]
    kinds: dict[tuple[Backend, bool], dict[_Kind, list[int]]] = {}
    staged: set[int] = set()
    positions: list[int] = []
    for index, (group, i, param, grad, _, state) in enumerate(every):
        of_group = asked[group]
        check(of_group.where(i), param, of_group.rule, of_group.group, state)
        backend = backend_of(of_group, param, grad, is_overlapping=i in shared_within[group])
        found = positions_of_channels(param, grad)
        is_taken = grad.dtype == param.dtype and backend.takes_channels_last(of_group.rule)
        positions.append(found if is_taken else 0)
        if not positions[index] and is_staged(backend, param, grad):
            staged.add(index)
        coded, compensated = is_coded(state, of_group.rule), is_compensated(param, of_group.group)
        kind = _Kind(group, param.device, param.dtype, grad.dtype, coded, compensated)
        kinds.setdefault((backend, backend.has_kernel(of_group.rule)), {}).setdefault(kind, []).append(index)
    shares = []
    for (backend, _), members in kinds.items():
        indices = list(chain.from_iterable(members.values()))
        batches = [_batch(kind, asked[kind.group], mine, every, positions) for kind, mine in members.items()]
        places = _places(indices, first, names, [asked[every[i].group].rule for i in indices])
        places[places < 0] = first[-1]  # where the description has a zero
        copied = [place for place, index in enumerate(indices) if index in staged]
        groups = [kind.group for kind in members]
        prepared = backend.prepare(batches)
        indices = None if indices == list(range(len(every))) else indices
        shares.append(_Share(backend, indices, groups, copied, places, places.copy(), batches, prepared))
    return shares


def _places(
    indices: Sequence[int], first: NDArray[numpy.int64], names: Sequence[Sequence[str]], rules: Sequence[Rule]
) -> NDArray[numpy.int64]:
    """Returns the places of some parameters' tensors among all: parameters, their gradients, then states."""
    words = numpy.full((len(indices), ADDRESSES.itemsize // 8), -1, numpy.int64)
    places = words.view(ADDRESSES)[:, 0]
    for place, index, rule in zip(places, indices, rules, strict=True):
        mine = {name: int(first[index]) + i for i, name in enumerate(names[index])}
        place["param"], place["grad"], place["step"] = index, len(names) + index, mine["step"]
        place["compensation"] = mine.get(COMPENSATION, -1)
        for number, name in enumerate(rule.states):
            codes, scale = stored_as(name)
            place["states"][number] = mine[codes] if codes in mine else mine[name]
            place["scales"][number] = mine.get(scale, -1)
    return words


def _batch(
    kind: _Kind, asked: Asked, indices: Sequence[int], every: Sequence[_Each], positions: Sequence[int]
) -> Batch:
    group = asked.group
    views = [block_view(every[i].param.shape, group["block_size"]) for i in indices]
    stochastic = group["stochastic_rounding"]
    firsts = [first_element(every[i].owner) if stochastic else 0 for i in indices]
    return Batch(
        rule=asked.rule,
        block_size=group["block_size"],
        rounding="compensated" if kind.compensated else "stochastic" if stochastic else "nearest",
        seed=group["seed"],
        dtype=kind.dtype,
        grad_dtype=kind.grad_dtype,
        device=kind.device,
        coded=kind.coded,
        capturable=group["capturable"],
        numbers=numpy.array([asked.numbers[every[i].i] for i in indices], numpy.int64),
        firsts=numpy.array(firsts, numpy.int64),
        views=views,
        positions=numpy.array([positions[i] for i in indices], numpy.int64),
        extents=numpy.array([(view.rows, view.row_length) for view in views], numpy.int64),
        codebooks=[CODEBOOKS[signed] for signed in asked.rule.states.values()],
    )


def _step(
    share: _Share,
    params: list[Tensor],
    grads: list[Tensor | None],
    states: States,
    hyper: Sequence[Mapping[str, Any]],
    found: NDArray[numpy.int64],  # addresses of all tensors, then a zero
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Step:
    if share.indices is not None:
        params, grads = [params[i] for i in share.indices], [grads[i] for i in share.indices]
        states = [states[i] for i in share.indices]
    elif share.staged:
        params, grads = [*params], [*grads]
    addresses = found.take(share.places, out=share.addresses, mode="clip")
    copies = []
    for i in share.staged:
        grad = grads[i]
        if grad is None:
            continue
        param, grad = params[i].resolve_neg().contiguous(), grad.resolve_neg().contiguous()
        if param is not params[i]:
            copies.append((params[i], param))
        params[i], grads[i] = param, grad
        at = addresses[i].view(ADDRESSES)
        at["param"], at["grad"] = param.data_ptr(), grad.data_ptr()
    hyper = [hyper[group] for group in share.groups]
    return Step(share.batches, hyper, grad_scale, found_inf, share.prepared, params, grads, states, addresses, copies)
