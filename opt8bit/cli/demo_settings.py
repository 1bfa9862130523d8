"""Says what ``opt8bit demo`` trains, and how. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoSettings:
    """Holds the settings of the model and its training; both runs share them."""

    steps: int = 350
    seed: int = 0
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    warmup: int = 20
    batch: int = 16
    context: int = 128
    width: int = 192
    heads: int = 4
    layers: int = 3
    eval_every: int = 50
    eval_batches: int = 24  # the same ones each time
