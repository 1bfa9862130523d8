"""The amounts of learning once layers are rounded, by one word each. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """The steps that a word stands for.

    Attributes:
        steps: of :func:`opt8bit.ptq.refine`; 0 for none.
        windows: of a step.
    """

    steps: int = 0
    windows: int = 4


EFFORTS = {
    "none": Effort(),
    "fast": Effort(steps=16),
    "balanced": Effort(steps=48),
    "best": Effort(steps=192),
}
