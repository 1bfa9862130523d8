"""Finds what an ONNX model takes, and what it is given to read a text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from opt8bit.ptq.corrected_onnx.graph import Graph
from opt8bit.ptq.corrected_onnx.library import onnx

TOKENS, MASK, POSITIONS, TYPES, PAST = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "past_key_values",
)


class OnnxInput(NamedTuple):
    """An input of a model.

    Attributes:
        name: of it.
        dtype: of its numbers.
        dims: its sizes; None for one that may be any.
    """

    name: str
    dtype: np.dtype
    dims: tuple[int | None, ...]


def inputs_of(path: Path) -> list[OnnxInput]:
    """Returns the inputs of a model in a file.

    Raises:
        ImportError: onnx is not installed.
        ValueError: there is no such model.
    """
    found = []
    for value in Graph.load(path, "the model").inputs:
        kind = value.type.tensor_type
        dims = (dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
        found.append(
            OnnxInput(value.name, np.dtype(onnx().helper.tensor_dtype_to_np_dtype(kind.elem_type)), tuple(dims))
        )
    return found


def batch_size(inputs: list[OnnxInput]) -> int | None:
    """Returns the number of samples that a model takes at once, or None where it takes any."""
    return next((each.dims[0] for each in inputs if each.dims and each.dims[0]), None)


def text_inputs(
    inputs: list[OnnxInput],
    ids: np.ndarray,  # (samples, length)
) -> dict[str, np.ndarray]:
    """Returns what a language model is given to read token ids, without anything that it has read before.

    Args:
        inputs: of the model.
        ids: token ids.

    Raises:
        ValueError: the model takes no token ids, or something else than what comes with them.
    """
    names = [each.name for each in inputs]
    if TOKENS not in names:
        raise ValueError(f"a text goes into models that take {TOKENS}, this one takes {', '.join(names)}: give arrays")
    known = {
        TOKENS: ids,
        MASK: np.ones_like(ids),
        POSITIONS: np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        TYPES: np.zeros_like(ids),
    }
    result = {}
    for name, dtype, dims in inputs:
        if name in known:
            result[name] = known[name].astype(dtype)
        elif name.startswith(PAST):
            result[name] = np.zeros([len(ids), *(dim or 0 for dim in dims[1:])], dtype)
        else:
            raise ValueError(f"it is not known what goes into {name} with a text: give arrays")
    return result
