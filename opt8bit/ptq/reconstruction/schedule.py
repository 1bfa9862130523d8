"""The rules of training: when learning rates fall, when held-out losses are measured, when it is given up."""

from __future__ import annotations

import math
from collections.abc import Callable

HOPELESS = 5  # steps in a row without a finite loss and gradient end the training
SCHEDULES: dict[str, Callable[[float], float]] = {  # what is left of a learning rate, by progress
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
}


def is_look(step: int, steps: int, looks: int) -> bool:
    """Tells whether the held-out loss is measured after a step, counted from 1: ``looks`` times, and after the last."""
    return step == steps or step % math.ceil(steps / looks) == 0
