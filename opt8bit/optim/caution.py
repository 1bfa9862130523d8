"""Cautious Optimizers: a step leaves out the elements that it would move against their gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from opt8bit.backends import Rule

LEAST_SHARE = 1e-3  # of the elements that move, as the step is scaled by its inverse


def caution_mask(
    direction: Tensor,  # of any shape: what is subtracted from the parameter, or an average of the same sign
    grad: Tensor,  # of that shape
) -> Tensor:
    """Returns 0 where a direction and the gradient have not the same sign, elsewhere one over the share of the others.

    The share is of the whole parameter, and taken as LEAST_SHARE where it is less. Signs are compared, as the product
    of two small numbers may be zero.

    Source: Cautious Optimizers: Improving Training with One Line of Code (Liang et al., 2024), whose code has it so.
    """
    agrees = direction.sign() * grad.sign() > 0
    share = agrees.mean(dtype=torch.float64).clamp(min=LEAST_SHARE)
    return agrees.to(direction.dtype) * (1 / share)


def cautious(rule: Rule) -> Rule:
    """Returns the cautious form of a rule, whose ``update`` takes ``caution``."""
    return replace(
        rule, name=f"{rule.name}_cautious", update=partial(rule.update, caution=True), whole=True, caution=True
    )
