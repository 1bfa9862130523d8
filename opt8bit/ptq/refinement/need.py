"""The memory that a refinement takes, estimated before it begins."""

from __future__ import annotations

from typing import Any

from torch import nn

from opt8bit.backends import warn
from opt8bit.ptq.model.blocks import find_blocks, linear_layers, matrix
from opt8bit.ptq.model.memory import bytes_of, gigabytes, machine_memory
from opt8bit.ptq.need import LIBRARIES
from opt8bit.ptq.refinement.passes import LOGITS

GRAPH = 3  # numbers in float32 that a block keeps for its gradients, for each input and output of its layers
OF_LOGITS = 6  # arrays of so many numbers in float32, with their gradients


def need(model: nn.Module, windows: int, length: int, *, in_memory: bool) -> tuple[int, int]:
    """Estimates the bytes that a refinement takes: whatever the windows, and those of them.

    Args:
        model: whose parameters need not be in memory.
        windows: sequences of a step.
        length: of the longest.
        in_memory: whether all of the float model is in memory.
    """
    _, blocks = find_blocks(model)
    shapes = [[matrix(layer).shape for layer in linear_layers(block).values()] for block in blocks]
    codes = sum(rows * columns for of_block in shapes for rows, columns in of_block)
    widths = max(sum(rows + columns for rows, columns in of_block) for of_block in shapes)
    config: Any = getattr(model, "config", None)
    features = getattr(config, "hidden_size", None) or shapes[0][0][1]
    models = (2 if in_memory else 1) * bytes_of(model)
    fixed = LIBRARIES + models + codes + OF_LOGITS * 4 * LOGITS
    return fixed, windows * length * 4 * (len(blocks) * features + GRAPH * widths)


def warn_of_memory(model: nn.Module, windows: int, length: int, *, in_memory: bool) -> None:
    """Warns of a refinement that will take more memory than the machine has.

    Args:
        model, windows, length, in_memory: as of :func:`need`.

    Warns:
        UserWarning: it will. The message says how many windows a step may have.
    """
    fixed, of_windows = need(model, windows, length, in_memory=in_memory)
    memory = machine_memory()
    if fixed + of_windows <= memory:
        return
    fit = int(max(memory - fixed, 0) // (of_windows / windows))
    advice = f"{fit} would fit" if fit else "no number of them would fit"
    warn(
        f"learning takes about {gigabytes(fixed + of_windows)} of memory, and the machine has {gigabytes(memory)}: "
        f"{gigabytes(fixed)} for the models and their logits, and {gigabytes(of_windows)} for the {windows} windows of "
        f"a step, of which {advice}"
    )
