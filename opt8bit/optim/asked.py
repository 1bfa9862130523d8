"""Says what a step has to do with the parameters of a group, and which backend serves each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from opt8bit.backends import Backend, Rule, backend_for, can_capture, get
from opt8bit.optim import shards
from opt8bit.optim.absent import PLAIN, Grads, held
from opt8bit.optim.facts import Facts
from opt8bit.optim.offload import Host, Hosts


class Asked(NamedTuple):
    """Says what a step has to do with one parameter group, or with some parameters of it."""

    rule: Rule
    group: dict[str, Any]
    planned: tuple[Any, ...]  # what plans depend on: the rule, and some options of the group
    wanted_backend: str | None
    params: Sequence[Tensor]  # what is stepped, a shard of a parameter or its copy on the CPU
    grads: Grads  # None for those that are left as they are: see `held`
    owners: Sequence[Tensor]  # the parameters themselves
    types: Set[type]  # of the gradients as they came, but for plain ones
    placements: tuple[Any, ...] | None  # how each of the parameters lies on the processes; None if all are plain
    first: int  # number of the group's first parameter in the optimizer
    numbers: Sequence[int]  # of these parameters in the optimizer
    hyper: Mapping[str, Any]

    def part(self, indices: Sequence[int]) -> Asked:
        """Returns the same request for only some of the parameters."""
        columns = (self.params, self.grads, self.owners, self.placements or [None] * len(self.owners), self.numbers)
        params, grads, owners, placements, numbers = ([column[i] for i in indices] for column in columns)
        placements = tuple(placements) if any(placements) else None
        return self._replace(params=params, grads=grads, owners=owners, placements=placements, numbers=numbers)

    def key(self) -> tuple[Any, ...]:
        """Returns what a plan depends on, besides tensors."""
        return (self.planned, self.numbers, self.types, self.placements, self.wanted_backend)

    @property
    def is_usual(self) -> bool:
        """Whether it is all parameters of the group, plain ones that are stepped where they are."""
        return not self.group["offload"] and self.placements is None and len(self.owners) == len(self.group["params"])

    def where(self, i: int) -> str:
        """Returns one of the parameters, in words: by its name, if it has one."""
        number = self.numbers[i]
        names = self.group.get("param_names")
        return f"parameter {names[number - self.first]!r}" if names else f"parameter {number}"


def asked_of(
    group: dict[str, Any],
    facts: Facts,
    hosts: Hosts,
    first: int,
    wanted: str | None,
    *,
    state: Mapping[Tensor, Any],
    alone: int | None = None,
    done: Set[Tensor] = frozenset(),
) -> Asked:
    """Returns what a step is asked to do with a group.

    Args:
        group: the parameter group.
        facts: what the group says.
        hosts: copies on the CPU of the parameters that are stepped there.
        first: number of the group's first parameter in the optimizer.
        wanted: the backend that the environment names.
        state: of the optimizer.
        alone: of the one parameter in it that is stepped now, if it is not all; its host has what it takes.
        done: parameters that have been stepped already.
    """
    params = group["params"]
    numbers: Sequence[int] = range(first, first + len(params))
    if alone is not None:
        params, numbers = params[alone : alone + 1], numbers[alone : alone + 1]
    grads = list(map(attrgetter("grad"), params))
    types = frozenset(map(type, grads))
    if done or type(None) in types:
        present = [i for i, grad in enumerate(grads) if grad is not None and params[i] not in done]
        types = frozenset(type(grads[i]) for i in present)
        if not (done or types - PLAIN or group["offload"]):
            present = sorted({*present, *held(params, grads, state)})
        if len(present) < len(params):
            params, grads = [params[i] for i in present], [grads[i] for i in present]
            numbers = [numbers[i] for i in present]
    types -= PLAIN
    owners, placements = params, None
    if types:
        placements = tuple(map(shards.placement_of, owners))
    if group["offload"]:
        on_host = fetched(hosts, owners) if alone is None else [hosts.of(param) for param in owners]
        params, grads = [host.param for host in on_host], [host.grad for host in on_host]
    elif placements:
        params, grads = list(map(shards.local, owners)), list(map(shards.local_grad, grads, owners))
    return Asked(
        rule=facts.rule,
        group=group,
        planned=facts.planned,
        wanted_backend=wanted,
        params=params,
        grads=grads,
        owners=owners,
        types=types,
        placements=placements,
        first=first,
        numbers=numbers,
        hyper=facts.hyper,
    )


def fetched(hosts: Hosts, params: Sequence[Tensor]) -> list[Host]:
    """Returns parameters and gradients on the CPU."""
    found = [hosts.fetched(param) for param in params]
    for host in found:
        host.wait()
    return found


def columns(asked: Sequence[Asked]) -> tuple[list[Tensor], list[Tensor | None], list[Mapping[str, Any]]]:
    """Returns the parameters of all groups and their gradients, and the hyper-parameters of each group."""
    params, grads = (list(chain.from_iterable(map(attrgetter(name), asked))) for name in ("params", "grads"))
    return params, grads, [each.hyper for each in asked]


def divided(asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """Divides a step into what can be stepped as it lies, and single parameters that have to be gathered.

    These are the ones that are sharded and whose rule looks at the full parameter.
    """
    if all(each.placements is None for each in asked):
        return list(asked), []
    together, one_by_one = [], []
    for each in asked:
        looks_at_wholes = each.rule.whole and each.placements
        apart = [i for i, param in enumerate(each.owners) if shards.is_divided(param)] if looks_at_wholes else []
        together.append(each.part(sorted({*range(len(each.owners))} - {*apart})) if apart else each)
        one_by_one += [each.part([i]) for i in apart]
    return together, one_by_one


def backend_of(asked: Asked, param: Tensor, grad: Tensor, *, is_overlapping: bool = False) -> Backend:
    """Returns the backend that serves a parameter.

    Raises:
        ValueError: the group asks for kernels that do not serve it.
    """
    backend = backend_for(param.device)
    fused = asked.group["fused"]
    if fused is False or is_overlapping or not backend.can_step(param, grad):
        backend = get("reference")
    if fused and not backend.has_kernel(asked.rule):
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
    return backend
