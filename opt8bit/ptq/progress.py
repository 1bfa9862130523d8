"""Bars that show how far a compression is, on a terminal or in a notebook."""

from __future__ import annotations

import time
from typing import Any

from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.result import Step

SMOOTHING = 0.1  # of the rate that the time left is computed from: layers come in bursts, those of one input together


class _Bar:
    """A bar of tqdm's that appears when there is something to show."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self._make = tqdm
        self._bar: Any = None

    def close(self) -> None:
        """Leaves the bar as it is, and ends its line."""
        if self._bar is not None:
            self._bar.close()


class LayerBar(_Bar):
    """A bar of tqdm's with the layers that are done, the time left and the error of the last layer.

    It appears with the first layer and is for one compression.

    Raises:
        ImportError: tqdm is not installed.

    Example:
        >>> result = ptq.compress(model, token_ids, see=LayerBar())  # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__()
        self._started = time.time()

    def __call__(self, report: LayerReport, layers: int) -> None:
        """Counts a layer.

        Args:
            report: on the layer.
            layers: how many there are.
        """
        if self._bar is None:
            self._bar = self._make(total=layers, unit="layer", smoothing=SMOOTHING)
            self._bar.start_t = self._started  # so that the time of the first layer counts
        self._bar.set_postfix_str(described(report), refresh=False)
        self._bar.update()
        if self._bar.n == layers:
            self.close()


class StepBar(_Bar):
    """A bar of tqdm's with the steps of a refinement, the time left and both losses.

    It appears before the first step and is for one refinement.

    Raises:
        ImportError: tqdm is not installed.

    Example:
        >>> refined = ptq.refine(result, token_ids, see=StepBar())  # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__()
        self._held_out = ""

    def __call__(self, step: Step) -> None:
        """Counts a step."""
        if self._bar is None:
            self._bar = self._make(desc="learning", total=step.steps, unit="step")
        if step.held_out is not None:
            self._held_out = f", held-out {step.held_out:.4f}"
        self._bar.set_postfix_str(f"loss {step.loss:.4f}{self._held_out}", refresh=False)
        self._bar.update(step.step - self._bar.n)


def described(report: LayerReport) -> str:
    """Returns a layer's name and its error, before and after correction if there is one."""
    error = f"{report.name} error {report.error_rounded:.2%}"
    if report.error_corrected == report.error_rounded:
        return error
    return f"{error}, corrected {report.error_corrected:.2%}"
