"""Defines what an optimizer has to say of its rules: the step loop and checkpoints need no more of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from opt8bit.backends import Rule, check_kernels
from opt8bit.optim.facts import hyper_of

RULES: dict[str, Rule] = {}  # the rules of all optimizers, by name
SIGNS: dict[str, bool] = {}  # of every state, whether it can be negative: as the first rule says that has it


class Ruled(torch.optim.Optimizer):
    """An optimizer with a rule for each parameter group.

    Attributes:
        rules: every rule that it can have, whatever its options.
        counterpart: its name in torch.optim; not every version of torch has each of them.
    """

    rules: ClassVar[Sequence[Rule]] = ()
    counterpart: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for rule in vars(cls).get("rules", ()):
            RULES.setdefault(rule.name, rule)
            for name, signed in rule.states.items():
                SIGNS.setdefault(name, signed)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        """
        Raises:
            TypeError: a rule is not as its compiled kernel has it.
        """
        for rule in self.rules:
            check_kernels(rule)
        super().__init__(params, defaults)

    def rule(self, group: dict[str, Any]) -> Rule:
        """Returns the update rule of a parameter group: the only one, unless a subclass says which."""
        (rule,) = self.rules
        return rule

    @classmethod
    def every_state(cls) -> dict[str, bool]:
        """Returns the states that it has with some setting or other, and whether each can be negative.

        Those that it has no use for now are left where they were when it was switched, and are not loaded.
        """
        return {name: signed for rule in cls.rules for name, signed in rule.states.items()}

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's hyper-parameters, ``rule.hyper``, from a parameter group."""
        return hyper_of(self.rule(group), group)

    def initial(self, group: dict[str, Any]) -> dict[str, float]:
        """Returns what states begin as, by name, where it is not zero."""
        return {}

    def checked_rule(self, group: dict[str, Any]) -> Rule:
        """Returns the rule of a group, whose hyper-parameters are checked.

        Raises:
            ValueError: one has a value that it cannot have.
        """
        self.check_group(group)
        rule = self.rule(group)
        if group["maximize"] and "maximize" not in rule.hyper:
            raise ValueError(f"maximize must be False for {type(self).__name__}, whose rule does not have it, got True")
        if group["caution"] and not rule.caution:
            raise ValueError(f"caution must be False for {type(self).__name__}, whose rule does not have it, got True")
        return rule

    def check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        """Raises where the rule of a group cannot take a parameter."""
        rule = self.rule(group)
        if rule.dim not in (None, param.dim()):
            taken = f"{type(self).__name__.removesuffix('8bit')} only supports {rule.dim}D parameters"
            raise ValueError(f"{taken} whereas we found a parameter with size: {param.size()}")

    @abstractmethod
    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyper-parameters that torch.optim refuses."""
