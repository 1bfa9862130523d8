"""What an optimizer has to say of its rule: the step loop and checkpoints ask no more of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.facts import hyper_of


class Ruled(torch.optim.Optimizer):
    """An optimizer with a rule for each parameter group."""

    @abstractmethod
    def rule(self, group: dict[str, Any]) -> Rule:
        """The update rule of a parameter group."""

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's hyper-parameters, ``rule.hyper``, from a parameter group."""
        return hyper_of(self.rule(group), group)

    def initial(self, group: dict[str, Any]) -> dict[str, float]:
        """What states begin as, by name, where it is not zero."""
        return {}

    def check_param(self, param: Tensor) -> None:
        """Raises where the rule cannot take a parameter."""

    @abstractmethod
    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyper-parameters that torch.optim refuses."""
