"""Options of ``opt8bit compress`` that are no part of a recipe, but of its file. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from opt8bit.recipe.options import option
from opt8bit.recipe.registry import FORMATS

DTYPES = ("float32", "bfloat16", "float16")  # to compute a model in
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1  # that torch takes


@dataclass(frozen=True)
class RunOptions:
    """Which text is learned from, and what is written."""

    samples: int = option(64, int, "windows of the calibration text", least=1, metavar="N")
    sequence_length: int = option(512, int, "tokens of a window", least=1, metavar="N")
    held_out: int = option(
        8, int, "windows of the rest of the calibration text that tell how good the result is", least=0, metavar="N"
    )
    format: str = option("compressed-tensors", FORMATS, "of the checkpoint")
    seed: int = option(
        0, int, "of the choice of windows; 0 takes the first ones", least=LEAST_SEED, most=MOST_SEED, metavar="N"
    )
    dtype: str | None = option(
        None,
        DTYPES,
        "to compute the model in, and to name in the result's config.json (default: the model's own)",
    )
