"""The files of a distributed checkpoint, read and written one tensor at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter


class Item(NamedTuple):
    """Says what a checkpoint is to hold under a name."""

    path: tuple[str | int, ...]  # the keys that lead to it in a nested state dict
    spec: tuple[torch.Size, torch.dtype] | None  # of a tensor; None for what is written as bytes
    made: Callable[[], Any]  # returns the tensor, on the CPU, or the bytes


class _BytesAsTheyAre(DefaultLoadPlanner):
    """Leaves what is no tensor in the bytes that were saved."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = value


class Source:
    """Reads a checkpoint.

    Args:
        metadata: what the checkpoint in ``folder`` lists.
    """

    def __init__(self, folder: Path, metadata: Any) -> None:
        self._folder, self._metadata = folder, metadata
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor, put together from its parts, on the CPU."""
        listed = self._metadata.state_dict_metadata[name]
        return self._read(name, torch.empty(listed.size, dtype=listed.properties.dtype, device="cpu"))

    def bytes_of(self, name: str) -> io.BytesIO:
        """Returns what was saved of a value that is no tensor."""
        return self._read(name, None)

    def value(self, name: str) -> Any:
        """Returns a value that is no tensor: numbers, strings, and lists and dicts of them."""
        return torch.load(self.bytes_of(name), weights_only=True)

    def _read(self, name: str, target: Any) -> Any:
        values = {name: target}
        planner = _BytesAsTheyAre(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(values, self._metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # whatever a damaged file makes of its reader
            raise ValueError(f"{name} cannot be read from {self._folder}: {error}") from error
        return values[name]


class _MadeWhenWritten(DefaultSavePlanner):
    """Asks for each tensor when its turn has come to be written."""

    def __init__(self, items: Mapping[str, Item]) -> None:
        super().__init__()
        self._items = items
        # Tensors that take no memory stand for those that are made later.
        stand_ins = {
            name: item.spec and torch.empty((), dtype=item.spec[1], device="cpu").expand(item.spec[0])
            for name, item in items.items()
        }
        self.set_up_planner(stand_ins, is_coordinator=True)
        self.mappings = {name: item.path for name, item in items.items()}

    def resolve_data(self, write_item: Any) -> Any:
        return self._items[write_item.index.fqn].made()


def write(folder: Path, items: Mapping[str, Item]) -> None:
    """Writes a checkpoint, as one process, with a file for each item: so only one of them is in memory at a time."""
    planner = _MadeWhenWritten(items)
    writer = FileSystemWriter(folder, single_file_per_rank=False)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [written])
