"""Adds tensors to a checkpoint's files. Everything else in them stays as it is, byte for byte."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch import Tensor

from opt8bit.ptq.model.checkpoint_files import INDEX
from opt8bit.ptq.model.tensor_files import ALIGNMENT, DTYPES, bytes_of, raw_header, writing

CHUNK = 2**24  # bytes that are copied at once


class _Entry(NamedTuple):
    """A tensor of a file that is to be written: what the header says of it, and where its bytes come from."""

    about: dict[str, Any]
    bytes: int
    start: int  # in the old file, behind its header
    tensor: Tensor | None  # instead, where it is new

    @property
    def element_bytes(self) -> int:
        return self.bytes // max(math.prod(self.about["shape"]), 1)


def add_tensors(
    files: Mapping[str, Path], folder: Path, tensors: Mapping[str, Tensor], beside: Mapping[str, str]
) -> None:
    """Writes a checkpoint's safetensors files, and their index, with more tensors in them.

    Args:
        files: the file of each tensor of the checkpoint.
        folder: to write to.
        tensors: that are added, or go in place of those of their names.
        beside: for each of them a tensor of the checkpoint, in whose file it goes.

    Raises:
        OSError: a file cannot be read or written.
    """
    for file in sorted(set(files.values())):
        own = {name: tensor for name, tensor in tensors.items() if files[beside[name]] == file}
        target = folder / file.name
        if own:
            _copy_with(file, target, own)
        else:
            with writing(target):
                shutil.copyfile(file, target)
    index = next(iter(files.values())).with_name(INDEX)
    if len(set(files.values())) > 1 or index.is_file():
        _write_index(index, folder, files, tensors, beside)


def _copy_with(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    header, start = raw_header(source)
    metadata = header.pop("__metadata__", None)
    entries = {name: _old(about) for name, about in header.items()}
    order = sorted(entries, key=lambda name: entries[name].start)
    entries |= {name: _new(tensor) for name, tensor in tensors.items()}
    order += [name for name in tensors if name not in order]
    if sum(entry.bytes for entry in entries.values() if entry.tensor is None) % ALIGNMENT:
        # What is added would not be aligned behind tensors of odd sizes: from large elements to small ones, all are.
        order.sort(key=lambda name: -entries[name].element_bytes)
    filled, written = 0, {} if metadata is None else {"__metadata__": metadata}
    for name in order:
        entry = entries[name]
        written[name] = {**entry.about, "data_offsets": [filled, filled + entry.bytes]}
        filled += entry.bytes
    text = json.dumps(written, ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with writing(target), source.open("rb") as old, target.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            entry = entries[name]
            if entry.tensor is not None:
                new.write(bytes_of(entry.tensor))
            else:
                old.seek(start + entry.start)
                _copy(old, new, entry.bytes)


def _old(about: dict[str, Any]) -> _Entry:
    start, end = about["data_offsets"]
    return _Entry(about, end - start, start, None)


def _new(tensor: Tensor) -> _Entry:
    about = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
    return _Entry(about, tensor.nbytes, 0, tensor)


def _copy(source: IO[bytes], target: IO[bytes], count: int) -> None:
    while count:
        data = source.read(min(count, CHUNK))
        if not data:
            raise OSError("the file ends too early")
        target.write(data)
        count -= len(data)


def _write_index(
    source: Path, folder: Path, files: Mapping[str, Path], tensors: Mapping[str, Tensor], beside: Mapping[str, str]
) -> None:
    index: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    added = {name: files[beside[name]].name for name in tensors if name not in files}
    index["weight_map"] = {**index["weight_map"], **added}
    if isinstance(index.get("metadata", {}).get("total_size"), int):
        index["metadata"]["total_size"] += sum(tensors[name].nbytes for name in added)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
