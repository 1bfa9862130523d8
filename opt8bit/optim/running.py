"""What an optimizer keeps between its steps, and in no checkpoint."""

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
    """It is made anew in an optimizer that is copied or unpickled.

    Args:
        optimizer: whose it is; not kept alive.
        prepare: (optimizer, group, parameter in it) -> its step beside the backward pass.

    Attributes:
        plans: of steps.
        facts: of parameter groups.
        hosts: of parameters that are stepped on the CPU.
        backward: the steps beside the backward pass.
        of_graphs: what CUDA graphs read whenever they are replayed.
    """

    def __init__(self, optimizer: Ruled, prepare: Callable[[Any, int, int], Callable[[], None]]) -> None:
        me, names = weakref.proxy(optimizer), optimizer.defaults
        self.plans: dict[Place, Plan] = {}
        self.facts = FactsOfGroups(names, lambda group: me.rule(group), lambda group: me.check_group(group))
        self.hosts = Hosts()
        self.backward = Backward(lambda: me.param_groups, self.hosts, lambda *place: prepare(me, *place))
        self.of_graphs: list[Any] = []
