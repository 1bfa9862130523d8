"""What a step of a parameter group works on, kept between steps for as long as it stays true.

A model may have thousands of small parameters, and looking each of them up costs more than updating it. So a plan
is made once, and each step only compares it with what it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from opt8bit.backends import (
    Backend,
    Batch,
    GroupUpdate,
    Rule,
    addresses,
    backend_for,
    can_capture,
    data_ptrs,
    describe,
    get,
)
from opt8bit.optim.shards import first_element, local
from opt8bit.optim.states import CODEBOOKS, COMPENSATION, check, is_coded, is_compensated
from opt8bit.quant import block_view

# Of a group, what plans depend on.
OPTIONS = ("block_size", "fused", "stochastic_rounding", "compensation", "seed", "capturable")

T = TypeVar("T")
States = Sequence[Mapping[str, Tensor]]  # of the parameters of a plan


class Asked(NamedTuple):
    """What a step is asked to do with one parameter group, or with one parameter of it."""

    place: tuple[int, int | None]  # the number of the group, and of the parameter if it is one alone
    rule: Rule
    group: dict[str, Any]
    wanted_backend: str | None
    params: Sequence[Tensor]  # that have a gradient: what is stepped, a shard of one or its copy on the CPU
    grads: Sequence[Tensor]
    owners: Sequence[Tensor]  # the parameters themselves
    types: Set[type]  # of the gradients as they came
    placements: tuple[Any, ...] | None  # how each of the parameters lies on the processes; None if all are plain
    numbers: Sequence[int]  # of these parameters in the optimizer
    hyper: Mapping[str, Any]
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def part(self, indices: Sequence[int]) -> Asked:
        """What is asked of some of the parameters."""
        columns = (self.params, self.grads, self.owners, self.placements or [None] * len(self.owners), self.numbers)
        params, grads, owners, placements, numbers = ([column[i] for i in indices] for column in columns)
        placements = tuple(placements) if any(placements) else None
        return self._replace(params=params, grads=grads, owners=owners, placements=placements, numbers=numbers)

    def key(self) -> tuple[Any, ...]:
        """What a plan depends on, besides tensors."""
        return (
            self.rule,
            self.numbers,
            self.types,
            self.placements,
            self.wanted_backend,
            *(self.group[name] for name in OPTIONS),
        )


class Work(NamedTuple):
    """What one backend does in one step, and the parameters that are written back from contiguous copies."""

    backend: Backend
    update: GroupUpdate
    copies: Sequence[tuple[Tensor, Tensor]]  # (parameter, contiguous copy)


class _Kind(NamedTuple):
    """Parameters of one kind go into one batch."""

    backend: Backend
    device: torch.device
    is_staged: bool  # the backend takes contiguous tensors only, and these or their gradients are not
    dtype: torch.dtype
    coded: bool
    compensated: bool


class _Part(NamedTuple):
    kind: _Kind
    indices: list[int]  # n: of the parameters among those of the plan
    places: NDArray[numpy.int64]  # (n, columns): of each param, its grad, step, states, ... among all tensors
    batch: Batch
    prepared: Any  # what the backend made of it


class Plan:
    """The parts of a group: parameters that one backend serves and that are stored alike.

    Args:
        asked: of the step that the plan is made for; its gradients are not kept.
        states: every state of the rule for each of the parameters.

    Raises:
        RuntimeError: several elements of a parameter are one number in memory.
        ValueError: ``fused=True`` and no compiled kernels can serve a parameter, or ``capturable=True`` and no kernels
            can that never wait for the device; or a state is not of the parameter's shape and dtype, or was made with
            another block size.
    """

    def __init__(self, asked: Asked, states: States) -> None:
        self.key = asked.key()
        tensors = _tensors(asked, states)
        # A tensor that gets more dimensions than there are now is noticed as a change.
        max_dim = max((tensor.dim() for tensor in tensors), default=0)
        shared = overlapping(asked.params)
        kinds: dict[_Kind, list[int]] = {}
        for index, (param, grad) in enumerate(zip(asked.params, asked.grads, strict=True)):
            check(f"parameter {asked.numbers[index]}", param, asked.rule, asked.group, states[index])
            backend, is_staged = backend_of(asked, param, grad, is_overlapping=index in shared)
            coded, compensated = is_coded(states[index], asked.rule), is_compensated(param, asked.group)
            kinds.setdefault(_Kind(backend, param.device, is_staged, param.dtype, coded, compensated), []).append(index)
        first = 2 * len(states) + numpy.cumsum([0, *map(len, states)])
        self.parts = [_part(kind, indices, asked, states, first) for kind, indices in kinds.items()]
        self.described = describe(tensors, max_dim)

    def work(self, asked: Asked, states: States) -> list[Work] | None:
        """The work of one step; None where a plan made for it would be another one."""
        if asked.key() != self.key:
            return None
        found = addresses(_tensors(asked, states), self.described)
        if found is None:
            return None
        return [_work(part, asked, states, found[part.places]) for part in self.parts]


def _tensors(asked: Asked, states: States) -> list[Tensor]:
    """The parameters, their gradients, then the states of the first of them, of the second, ..."""
    return [*asked.params, *asked.grads, *chain.from_iterable(state.values() for state in states)]


def _names(rule: Rule, kind: _Kind) -> list[str]:
    """Of the states of one parameter, in the order of their addresses in GroupUpdate."""
    absmaxes = [f"{name}_absmax" for name in rule.states] if kind.coded else []
    return ["step", *rule.states, *absmaxes, *([COMPENSATION] if kind.compensated else [])]


def _part(kind: _Kind, indices: Sequence[int], asked: Asked, states: States, first: NDArray[numpy.int64]) -> _Part:
    params = [asked.params[i] for i in indices]
    views = [block_view(param.shape, asked.group["block_size"]) for param in params]
    names = _names(asked.rule, kind)
    order = [(i, list(states[i])) for i in indices]
    places = [[i, len(states) + i, *(first[i] + stored.index(name) for name in names)] for i, stored in order]
    stochastic = asked.group["stochastic_rounding"]
    batch = Batch(
        rule=asked.rule,
        block_size=asked.group["block_size"],
        rounding="compensated" if kind.compensated else "stochastic" if stochastic else "nearest",
        seed=asked.group["seed"],
        dtype=kind.dtype,
        coded=kind.coded,
        capturable=asked.group["capturable"],
        numbers=numpy.array([asked.numbers[i] for i in indices], numpy.int64),
        firsts=numpy.array([first_element(asked.owners[i]) if stochastic else 0 for i in indices], numpy.int64),
        views=views,
        extents=numpy.array([(view.rows, view.row_length) for view in views], numpy.int64),
        codebooks=[CODEBOOKS[signed] for signed in asked.rule.states.values()],
    )
    prepared = kind.backend.prepare(batch, kind.device)
    return _Part(kind, list(indices), numpy.array(places, numpy.int64), batch, prepared)


def _work(part: _Part, asked: Asked, states: States, found: NDArray[numpy.int64]) -> Work:
    params, grads = _of_part(part, asked.params), _of_part(part, asked.grads)
    copies: list[tuple[Tensor, Tensor]] = []
    given = params
    if part.kind.is_staged:
        grads = [grad.resolve_neg().contiguous() for grad in grads]
        given = [param.resolve_neg().contiguous() for param in params]
        copies = [pair for pair in zip(params, given, strict=True) if pair[0] is not pair[1]]
        found[:, 0], found[:, 1] = data_ptrs(given), data_ptrs(grads)
    update = GroupUpdate(
        batch=part.batch,
        hyper=asked.hyper,
        grad_scale=asked.grad_scale,
        found_inf=asked.found_inf,
        prepared=part.prepared,
        params=given,
        grads=grads,
        state=_of_part(part, states),
        addresses=found,
    )
    return Work(part.kind.backend, update, copies)


def _of_part(part: _Part, column: Sequence[T]) -> Sequence[T]:
    return column if len(part.indices) == len(column) else [column[i] for i in part.indices]


def backend_of(asked: Asked, param: Tensor, grad: Tensor, *, is_overlapping: bool = False) -> tuple[Backend, bool]:
    """The backend that serves a parameter, and whether it takes a contiguous copy of it.

    Raises:
        ValueError: the group asks for kernels that do not serve it.
    """
    backend = backend_for(param.device)
    fused = asked.group["fused"]
    if fused is False or is_overlapping or grad.dtype != param.dtype or not backend.can_step(param):
        backend = get("reference")
    if fused and backend.name == "reference":
        raise ValueError(
            f"fused=True, but no compiled kernels serve {asked.rule.name} for a parameter of {param.dtype} on "
            f"{param.device} with a gradient of {grad.dtype}"
            f"{', in memory that another may share' if is_overlapping else ''}; leave fused out"
        )
    if asked.group["capturable"] and not (backend.name == "triton" and can_capture(param, asked.rule)):
        raise ValueError(
            f"capturable=True takes kernels in Triton, and none serve {asked.rule.name} for a parameter of "
            f"{param.dtype} on {param.device} with a gradient of {grad.dtype}; leave capturable out"
        )
    # A single number is contiguous whatever it is a view of, such as the imaginary part of a conjugate: what lies in
    # memory there is its negative.
    is_plain = param.is_contiguous() and grad.is_contiguous() and param.numel() > 1
    return backend, backend.name != "reference" and not is_plain


def refuse_shared(params: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: parameters share memory, so that no copy of one can be stepped without the other.
    """
    shared = overlapping([local(param) for param in params if not param.is_meta])
    if shared:
        raise ValueError(f"offload takes parameters that have memory of their own: {len(shared)} share theirs")


def overlapping(params: Sequence[Tensor]) -> set[int]:
    """Indices of parameters that may share memory: they are stepped one after another, as torch.optim does."""
    spans = []
    for index, param in enumerate(params):
        if param.numel() == 0:
            continue
        reach = [(size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)]
        if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
            raise RuntimeError(
                f"several elements of a parameter of shape {tuple(param.shape)} and strides {param.stride()} are one "
                "number in memory: it cannot be updated in place"
            )
        end = param.data_ptr() + (sum(reach) + 1) * param.element_size()
        spans.append((str(param.device), param.data_ptr(), end, index))
    result: set[int] = set()
    furthest = ("", 0, 0, -1)  # the span that ends last, of those that begin before
    for span in sorted(spans):
        is_beside = span[0] == furthest[0]
        if is_beside and span[1] < furthest[2]:
            result |= {furthest[3], span[3]}
        if not is_beside or span[2] > furthest[2]:
            furthest = span
    return result
