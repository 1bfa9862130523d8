"""The progress of commands that take long, on stderr: bars on a terminal, lines in a pipe or a file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from itertools import count

from opt8bit.ptq import LayerReport
from opt8bit.ptq.progress import LayerBar, StepBar, described
from opt8bit.ptq.result import Step

ShowStep = Callable[[int, float, "float | None"], None]  # step, training loss, validation loss if it was measured
ShowRefined = Callable[[Step], None]  # the step of a refinement that was just made
ShowLayer = Callable[[LayerReport, int], None]  # the layer just finished, number of layers


def has_bars() -> bool:
    """Tells whether stderr is a terminal that can move its cursor, and tqdm is installed."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and find_spec("tqdm") is not None


@contextmanager
def training(name: str, steps: int) -> Iterator[ShowStep]:
    """Yields what shows the steps of a training run."""
    if not has_bars():
        yield lambda step, loss, measured: _show_step_line(f"{name}: step {step} of {steps}", measured)
        return
    from tqdm import tqdm

    with tqdm(desc=name, total=steps, unit="step") as bar:

        def show(step: int, loss: float, measured: float | None) -> None:
            bar.set_postfix_str(f"training loss {loss:.3f}", refresh=False)
            bar.update(step - bar.n)

        yield show


def _show_step_line(where: str, measured: float | None) -> None:
    if measured is not None:
        print(f"{where}, validation loss {measured:.4f}", file=sys.stderr)


@contextmanager
def compression() -> Iterator[ShowLayer]:
    """Yields what shows each layer with its error before and after correction; a bar has the time left, too."""
    if has_bars():
        with closing(LayerBar()) as bar:
            yield bar
        return
    numbers = count(1)
    yield lambda report, layers: print(f"layer {next(numbers)} of {layers}: {described(report)}", file=sys.stderr)


@contextmanager
def refinement() -> Iterator[ShowRefined]:
    """Yields what shows the steps of a refinement: a bar, or a line whenever the held-out loss is measured."""
    if not has_bars():
        yield _show_refined_line
        return
    with closing(StepBar()) as bar:
        yield bar


def _show_refined_line(step: Step) -> None:
    if step.held_out is not None:
        left = f", {step.seconds_left:.0f} s left" if step.step else ""
        print(f"learning, step {step.step} of {step.steps}: held-out loss {step.held_out:.4f}{left}", file=sys.stderr)


@contextmanager
def logged() -> Iterator[None]:
    """Shows on stderr what the library logs while it works."""
    logger, handler = logging.getLogger("opt8bit"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
