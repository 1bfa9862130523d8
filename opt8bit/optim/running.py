"""Holds what an optimizer keeps between its steps, and in no checkpoint."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from opt8bit.optim.backward import Backward
from opt8bit.optim.facts import FactsOfGroups
from opt8bit.optim.offload import Hosts
from opt8bit.optim.plan import Plan
from opt8bit.optim.ruled import Ruled

Place = tuple[int, "int | None"] | None  # a group's number, and that of one parameter in it; None for all groups


class Running:
    """The run-time state of one optimizer. An optimizer that is copied or unpickled gets a new one.

    Args:
        optimizer: the optimizer, which this does not keep alive.
        prepare: (optimizer, group, parameter in it) -> the step of that parameter beside the backward pass.

    Attributes:
        plans: the plans of steps, kept for as long as they stay true.
        facts: what parameter groups say, checked when it changes.
        hosts: copies on the CPU of the parameters that are stepped there.
        backward: the steps that are taken beside the backward pass.
        of_graphs: what CUDA graphs read whenever they are replayed.
    """

    def __init__(self, optimizer: Ruled, prepare: Callable[[Any, int, int], Callable[[], None]]) -> None:
        me, names = weakref.proxy(optimizer), optimizer.defaults
        self.plans: dict[Place, Plan] = {}
        self.facts = FactsOfGroups(names, lambda group: me.checked_rule(group))
        self.hosts = Hosts()
        self.backward = Backward(lambda: me.param_groups, self.hosts, lambda *place: prepare(me, *place))
        self.of_graphs: list[Any] = []
