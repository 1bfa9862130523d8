"""Estimates what a run takes of the machine's memory, before it begins.

The factors are fitted to what runs on LLaMAs of 512, 1024 and 2048 features took: they are an estimate, not a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from opt8bit.backends import warn
from opt8bit.ptq import ranks
from opt8bit.ptq.model.blocks import find_blocks, linear_layers, matrix
from opt8bit.ptq.model.memory import bytes_of, gigabytes, machine_memory, outside
from opt8bit.ptq.plan import Plan

LIBRARIES = 400_000_000  # bytes of a process that has imported torch and transformers
SQUARES = 4  # matrices (in, in) of a layer in float64: sums, moments, and what rounding makes of them
WEIGHTS = 6  # copies of a layer's weight in float32, while it is rounded
WORKING = 8  # copies of a batch's widest inputs in float32, while they are summed and compared
LOGITS = 5  # of one sequence, in float32: of both models, their logarithms, and one on the way


class Need(NamedTuple):
    """Counts the bytes of memory that a run takes, by what takes them.

    Attributes:
        model: what is in memory of the model all the time.
        block: the block that is worked on, and its copy.
        hidden: hidden states of all tokens, in both streams, with what the layers of one block make of them.
        layer: statistics of the largest layer, and its weight while it is rounded.
    """

    model: int
    block: int
    hidden: int
    layer: int

    @property
    def total(self) -> int:
        return LIBRARIES + sum(self)


def need(model: nn.Module, batches: Sequence[dict[str, Tensor]], plan: Plan, *, in_memory: bool) -> Need:
    """Estimates what a run takes.

    Args:
        model: whose parameters need not be in memory.
        batches: all that this process takes through the blocks.
        plan: of the run.
        in_memory: whether all of the model is in memory, or only what is outside of its blocks.
    """
    _, blocks = find_blocks(model)
    weights = [matrix(layer) for block in blocks for layer in linear_layers(block).values()]
    features, itemsize = weights[0].shape[1], weights[0].element_size()
    widest = max(weight.shape[1] for weight in weights)
    largest = max(weight.numel() for weight in weights)
    block = max(map(bytes_of, blocks))
    tokens = [batch["input_ids"].numel() for batch in batches]
    longest = max(batch["input_ids"].shape[-1] for batch in batches)
    # Before its widest layer a pass holds what went into the block, the sum so far and the norm's output, and the
    # layer's inputs. The model's mask is there once for both.
    held = 2 * (4 * features + widest) + longest
    drifts = 4 * features if plan.error_propagation else 0
    logits = LOGITS * 4 * longest * getattr(getattr(model, "config", None), "vocab_size", 0)
    squares = SQUARES * 8 * widest**2 if plan.looks_at_inputs else 0
    working = WORKING * 4 * widest * max(tokens)
    rounded = 0 if plan.outside is None else outside(model)
    return Need(
        model=rounded + (bytes_of(model) if in_memory else outside(model)),
        block=block if in_memory else 2 * block,
        hidden=sum(tokens) * (held * itemsize + drifts),
        layer=max(squares + WEIGHTS * 4 * largest + working, logits),
    )


def warn_of_memory(model: nn.Module, batches: Sequence[dict[str, Tensor]], plan: Plan, *, in_memory: bool) -> None:
    """Warns of a run that will take more memory than the machine has, all its processes together.

    Args:
        model, batches, plan, in_memory: as of :func:`need`.

    Warns:
        UserWarning: it will. The message has the numbers, and what to do.
    """
    if next(model.parameters()).device.type not in ("cpu", "meta"):
        return
    found, memory = need(model, batches, plan, in_memory=in_memory), machine_memory()
    total = found.total * ranks.size()
    if total <= memory or ranks.rank():
        return
    processes = f" in {ranks.size()} processes" if ranks.size() > 1 else ""
    weights, layer, hidden = (gigabytes(size) for size in (found.model + found.block, found.layer, found.hidden))
    warn(
        f"this run takes about {gigabytes(total)} of memory{processes}, and the machine has {gigabytes(memory)}: "
        f"{weights} for weights, {layer} for the largest layer's statistics, and {hidden} for hidden states, which "
        "fewer windows of the calibration text, or shorter ones, make less (--samples, --held-out, --sequence-length)"
    )
