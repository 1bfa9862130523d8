"""The steps of a refinement, and the choice among what they lead to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opt8bit.optim import AdamW8bit
from opt8bit.ptq.reconstruction.schedule import HOPELESS, SCHEDULES, is_look
from opt8bit.ptq.refinement.losses import Loss, Windows, joined
from opt8bit.ptq.refinement.passes import Chain
from opt8bit.ptq.refinement.student import Student
from opt8bit.ptq.result import Refined, Step


@dataclass(frozen=True)
class Schedule:
    """The steps.

    Attributes:
        steps: of the optimizer.
        windows: of a step.
        lr: of the logarithms of scales; it falls to 0 along a cosine, as the other does.
        vector_lr: of norms and biases.
        looks: how often the held-out loss is measured.
        seed: of the order of the windows.
    """

    steps: int
    windows: int
    lr: float
    vector_lr: float
    looks: int
    seed: int


def train(
    student: Student,
    chain: Chain,
    learned: Sequence[Windows],
    held_out: Sequence[Windows],
    loss: Loss,
    schedule: Schedule,
    see: Callable[[Step], None],
) -> Refined:
    """Trains a student in place; it ends with the parameters of the least loss on windows that are not learned from.

    Args:
        student: whose parameters are trained.
        chain: of its model.
        learned, held_out: windows, one sequence each.
        loss: of logits and the windows' targets.
        schedule: of the steps.
        see: called before the first step, and after each.

    Raises:
        ValueError: the held-out loss is not finite before the first step.
    """
    params, generator = [*student.scales, *student.vectors], torch.Generator().manual_seed(schedule.seed)
    optimizer = _optimizer(student, schedule)
    start = best = _mean_loss(chain, held_out, loss, schedule.windows)
    if not math.isfinite(start):
        raise ValueError(f"the loss must be finite before the first step, got {start}")
    kept, values, dropped, in_a_row = 0, [param.detach().clone() for param in params], 0, 0
    see(Step(0, schedule.steps, math.nan, start, math.nan))
    started, order = time.perf_counter(), list[int]()
    for step in range(1, schedule.steps + 1):
        if len(order) < schedule.windows:
            order += torch.randperm(len(learned), generator=generator).tolist()
        chosen, order = [learned[i] for i in order[: schedule.windows]], order[schedule.windows :]
        _set_lr(optimizer, schedule, step)
        found = _gradients(student, chain, chosen, loss)
        if _are_finite(found, params):
            optimizer.step()
            student.install()
            in_a_row = 0
        else:
            found, dropped, in_a_row = math.nan, dropped + 1, in_a_row + 1
        optimizer.zero_grad()
        measured = None
        if is_look(step, schedule.steps, schedule.looks):
            measured = _mean_loss(chain, held_out, loss, schedule.windows)
            if measured < best:
                best, kept, values = measured, step, [param.detach().clone() for param in params]
        left = (time.perf_counter() - started) / step * (schedule.steps - step)
        see(Step(step, schedule.steps, found, measured, left))
        if in_a_row == HOPELESS:
            break
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    student.install()
    return Refined(schedule.steps, kept, start, best, dropped)


def _optimizer(student: Student, schedule: Schedule) -> AdamW8bit:
    groups = [{"params": student.scales, "lr": schedule.lr}, {"params": student.vectors, "lr": schedule.vector_lr}]
    return AdamW8bit([group for group in groups if group["params"]], weight_decay=0.0)


def _set_lr(optimizer: AdamW8bit, schedule: Schedule, step: int) -> None:
    """Sets the learning rates of a step, counted from 1."""
    fraction = SCHEDULES["cosine"]((step - 1) / schedule.steps)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * fraction


def _gradients(student: Student, chain: Chain, windows: Sequence[Windows], loss: Loss) -> float:
    """Returns the mean loss over the tokens that count; the student's parameters get its gradients."""
    total, tokens = 0.0, _tokens(windows)

    def collect(i: int) -> None:
        for each in student.of_blocks[i]:
            each.collect()

    for group in joined(windows):
        total += chain.backward(group, loss, 1 / tokens, collect)
    for each in student.trained.values():  # what stands behind the blocks
        each.collect()
    return total / tokens


def _are_finite(loss: float, params: Sequence[nn.Parameter]) -> bool:
    gradients: list[Tensor] = [param.grad for param in params if param.grad is not None]
    return math.isfinite(loss) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def _mean_loss(chain: Chain, windows: Sequence[Windows], loss: Loss, at_once: int) -> float:
    """Nats per token that counts."""
    groups = [each for i in range(0, len(windows), at_once) for each in joined(windows[i : i + at_once])]
    return sum(chain.loss(group, loss) for group in groups) / _tokens(groups)


def _tokens(windows: Sequence[Windows]) -> float:
    """Counts the tokens that count; 1 where none does, as there is nothing to divide then."""
    return max(sum(float(each.counts.sum()) for each in windows), 1.0)
