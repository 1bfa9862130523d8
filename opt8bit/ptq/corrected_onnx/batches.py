"""Reads what two ONNX models are called with: arrays by the names of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opt8bit.ptq.corrected_onnx.graph import Graph
from opt8bit.ptq.corrected_onnx.running import Values


def check_inputs(quantized: Graph, reference: Graph) -> None:
    """
    Raises:
        ValueError: two models do not have the same inputs.
    """
    names, names_hat = ({each.name for each in graph.inputs} for graph in (reference, quantized))
    if names != names_hat:
        found = f"{', '.join(sorted(names_hat))} and {', '.join(sorted(names))}"
        raise ValueError(f"the quantized file and the reference must have the same inputs, got {found}")


def as_values(name: str, data: Iterable[Mapping[str, Any]], graph: Graph) -> list[Values]:
    """Returns batches as tensors.

    Args:
        name: of the data, for messages.
        data: an iterable of dictionaries that have an array or a tensor for each input of the model.
        graph: of the model.

    Raises:
        TypeError: it is none of these.
        ValueError: there are none, or inputs are missing or unknown.
    """
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        found = type(data).__name__
        raise TypeError(f"{name} must be an iterable of batches, got {found}: put a single one in a list")
    batches = []
    wanted = {each.name for each in graph.inputs}
    for batch in data:
        if not isinstance(batch, Mapping):
            raise TypeError(f"{name} must hold dictionaries of arrays, got {type(batch).__name__}")
        if set(batch) != wanted:
            listed = f"{', '.join(sorted(wanted))}, got {', '.join(map(str, batch))}"
            raise ValueError(f"{name} must have the model's inputs in each batch: {listed}")
        batches.append({key: _as_tensor(f"{name}: {key}", value) for key, value in batch.items()})
    if not batches:
        raise ValueError(f"{name} must hold at least one batch, got none")
    return batches


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be an array or a tensor, got {type(value).__name__}")
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except TypeError as error:
        raise TypeError(f"{name} must be an array of numbers, got {value.dtype}") from error
