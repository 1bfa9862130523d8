"""Options of ``opt8bit compress`` and ``correct`` that are no part of a recipe. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opt8bit.recipe.corrections import ORDERS, STATISTICS
from opt8bit.recipe.options import option
from opt8bit.recipe.registry import FORMATS
from opt8bit.recipe.runtimes import RUNTIMES, check_reads, packed_format

DTYPES = ("float32", "bfloat16", "float16")  # to compute a model in
TEXT_OPTIONS = ("samples", "sequence_length", "held_out", "seed", "bos")  # of RunOptions, those that choose the text
BOS = "begin each window with the token that begins a text, in place of its first, as Gemma expects"
LENGTH, WINDOWS = 512, 20  # tokens of a window, and windows, that a model is evaluated on
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1  # that torch takes


@dataclass(frozen=True)
class RunOptions:
    """Says which text is learned from, and what is written.

    Raises:
        ValueError: the runtime does not read the format.
    """

    samples: int = option(64, int, "windows of the calibration text", least=1, metavar="N")
    sequence_length: int = option(512, int, "tokens of a window", least=1, metavar="N")
    held_out: int = option(
        8, int, "windows of the rest of the calibration text that tell how good the result is", least=0, metavar="N"
    )
    format: str | None = option(
        None, FORMATS, "of the checkpoint (default: what the runtime reads, or compressed-tensors)"
    )
    runtime: str | None = option(
        None,
        RUNTIMES,
        "what is to run the checkpoint: it gets the grids, group size and packing that it reads best, and what it does "
        "not run is refused",
        flag="for",
    )
    seed: int = option(
        0, int, "of the choice of windows; 0 takes the first ones", least=LEAST_SEED, most=MOST_SEED, metavar="N"
    )
    bos: bool = option(False, bool, BOS)
    dtype: str | None = option(
        None,
        DTYPES,
        "to compute the model in, and to name in the result's config.json (default: the model's own)",
    )

    def __post_init__(self) -> None:
        if self.format is None:
            object.__setattr__(self, "format", packed_format(self.runtime))
        check_reads(self.runtime, self.checkpoint_format)

    @property
    def checkpoint_format(self) -> str:
        """The format, as it was given or by the runtime."""
        assert self.format is not None
        return self.format

    @property
    def windows(self) -> dict[str, Any]:
        """Returns how windows of the calibration text are chosen, as keyword arguments of ``choose_windows``."""
        own = {name: getattr(self, name) for name in TEXT_OPTIONS if name != "sequence_length"}
        return {"length": self.sequence_length, **own}


@dataclass(frozen=True)
class CorrectionOptions:
    """Says how a checkpoint is corrected."""

    order: str = option(
        "local",
        ORDERS,
        "of corrections: each layer sees what it sees in the float model, or what the corrected layers before it make",
    )
    statistic: str = option("mean", STATISTICS, "of the errors")
