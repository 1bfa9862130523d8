"""Holds what verify finds of a checkpoint, and what it may find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# How far logits may be apart, in units of their own spread: sums in another order, in the model's dtype.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same of a program that rounds the inputs of layers to 8 bits.
TOLERANCE_OF_PROGRAMS = 0.5


class Verification(NamedTuple):
    """Says what was found.

    Attributes:
        error: the largest difference of a logit, relative to the logits' standard deviation; infinite where a parameter
            is missing, without which nothing is computed.
        tolerance: that it may have.
        dropped: tensors of the checkpoint that the loaded model has no place for, though it had for the source's.
        missing: parameters of the loaded model that the checkpoint does not have.
        differences: from the source, of tensors' names, dtypes and shapes, and of the tokenizer.
        in_parts: whether its blocks were left on disk until they were run, as a user's would not be.
        unpacked: why it was not loaded by transformers but unpacked by this package; None where it was loaded.
        run_error: the same as ``error`` of the program that reads the format, where it is installed.
    """

    error: float
    tolerance: float
    dropped: Sequence[str]
    missing: Sequence[str]
    differences: Sequence[str] = ()
    in_parts: bool = False
    unpacked: str | None = None
    run_error: float | None = None

    @property
    def is_right(self) -> bool:
        is_run_right = self.run_error is None or self.run_error <= TOLERANCE_OF_PROGRAMS
        return self.error <= self.tolerance and is_run_right and not (self.dropped or self.missing or self.differences)

    def __str__(self) -> str:
        lines = [f"logits differ by {self.error:.1e} of their spread, {self.tolerance:.0e} is allowed"]
        if self.missing:
            lines = ["it cannot be run: parameters are missing"]
        if self.in_parts:
            lines[0] += " (run from disk, block by block, as it takes too much of this machine's memory)"
        if self.unpacked is not None:
            lines[0] += f" (unpacked by opt8bit: {self.unpacked})"
        if self.run_error is not None:
            found, allowed = f"{self.run_error:.1e}", f"{TOLERANCE_OF_PROGRAMS:.0e}"
            lines.append(f"run by the program that reads the format: they differ by {found}, {allowed} is allowed")
        lines += [f"dropped on loading: {name}" for name in self.dropped]
        lines += [f"missing: {name}" for name in self.missing]
        return "\n".join([*lines, *self.differences])
