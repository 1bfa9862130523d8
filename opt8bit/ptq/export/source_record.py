"""Records the names, dtypes and shapes of the source's tensors, of which none may get lost."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from opt8bit.ptq.model import tensor_files
from opt8bit.ptq.report import FOLDER

RECORD = "source.json"


@dataclass
class SourceRecord:
    """The tensors of a source, as its checkpoint has them.

    Attributes:
        tensors: dtype, as safetensors spells it, and shape, by name.
        changed: names of those whose values have changed.
        added: names of the biases that layers have got.
        without_place: names of those that the model does not load: vision towers, layers that predict further tokens.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    without_place: list[str] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor of the source down."""
        self.tensors[name] = (tensor_files.DTYPES[tensor.dtype], tuple(tensor.shape))

    def write(self, checkpoint: Path) -> None:
        """Writes the record into a checkpoint's folder."""
        (checkpoint / FOLDER).mkdir(exist_ok=True)
        (checkpoint / FOLDER / RECORD).write_text(json.dumps(vars(self)) + "\n")


def read_record(checkpoint: Path) -> SourceRecord | None:
    """Returns the record in a checkpoint's folder, or None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = checkpoint / FOLDER / RECORD
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in found.pop("tensors").items()}
        return SourceRecord(tensors, **found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def differences(
    record: SourceRecord,
    stored: Mapping[str, tensor_files.Header],
    packed: Mapping[str, tuple[int, int]],
    parts: Collection[str],
    keeps_others: bool = True,
) -> Iterator[str]:
    """Yields what is otherwise in a checkpoint than in its source, though nothing was to change there.

    Args:
        record: of the source.
        stored: what the checkpoint has, by name.
        packed: shapes (out, in) of its packed weights, by the names that the weights had.
        parts: what stands behind a layer's name in the names of packed weights' tensors.
        keeps_others: whether the checkpoint has the tensors that the model does not load.
    """
    for name, (dtype, shape) in record.tensors.items():
        has = stored.get(name)
        if name in packed:
            if packed[name] != shape:
                yield f"{name} is {packed[name]}, {shape} in the source"
        elif has is None:
            if keeps_others or name not in record.without_place:
                yield f"{name} is lost"
        elif has.shape != shape or (has.dtype != dtype and name not in record.changed):
            yield f"{name} is {has.dtype} {has.shape}, {dtype} {shape} in the source"
    for name in sorted(stored.keys() - record.tensors.keys() - set(record.added)):
        owner, _, kind = name.rpartition(".")
        if f"{owner}.weight" not in packed or kind not in parts:
            yield f"{name} is not in the source"
