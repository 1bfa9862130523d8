"""Reads a GGUF file as a checkpoint: tensors by the names that the model has for them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt8bit.ptq.model.gguf.architectures import WEIGHT, as_halves, named
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.recipe.gguf_types import GGUF_TYPES

FILE, SUFFIX = "model.gguf", ".gguf"
BLOCKS = "blocks"  # stands for "weight" in the names of weights that are blocks of codes
TYPE = "type"  # likewise, for ggml's number of their type, which takes no bytes of its own
PLAIN = ("F32", "F16")


def package() -> Any:
    """
    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError("gguf is missing: pip install 'opt8bit[gguf]'") from error


def type_tensor(kind: str) -> Tensor:
    """Returns ggml's number of a type, uint8 (1,)."""
    return torch.tensor([int(package().GGMLQuantizationType[kind])], dtype=torch.uint8)


def type_named(number: Tensor) -> str:
    """Returns ggml's name of a type by :func:`type_tensor`."""
    return package().GGMLQuantizationType(int(number)).name


class GGUFFile:
    """The tensors of a file by the model's names.

    A weight that is blocks is ``LAYER.blocks``, (out, blocks, bytes), and its type ``LAYER.type``.

    Args:
        path: of the file, which is mapped.

    Attributes:
        architecture: of the model.
        has_tokenizer: whether it has one.

    Raises:
        ValueError: it is damaged, of another architecture or with other types of blocks than those known here.
    """

    def __init__(self, path: Path) -> None:
        try:
            reader = package().GGUFReader(path)
            fields = reader.fields
            self.architecture = named(str(fields["general.architecture"].contents()))
            count = f"{self.architecture.name}.attention.head_count"
            self._heads = tuple(int(fields[key].contents()) for key in (count, f"{count}_kv"))
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from error
        self.has_tokenizer = "tokenizer.ggml.tokens" in fields
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            name = self.architecture.model_name(tensor.name)
            kind = tensor.tensor_type.name
            if kind not in (*PLAIN, *GGUF_TYPES):
                allowed = ", ".join((*PLAIN, *GGUF_TYPES))
                raise ValueError(f"{path}: {tensor.name} must be one of {allowed}, got {kind}")
            if name is not None and kind in GGUF_TYPES:
                self._tensors |= {f"{name.removesuffix(WEIGHT)}{part}": tensor for part in (BLOCKS, TYPE)}
            elif name is not None:
                self._tensors[name] = tensor

    def keys(self) -> list[str]:
        """Returns the names of its tensors."""
        return list(self._tensors)

    def header(self, name: str) -> Header:
        """Returns what the file says of a tensor."""
        tensor = self._tensors[name]
        kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
        if _is_type(name, kind):
            return Header("U8", (1,), 0)
        if kind in GGUF_TYPES:
            size = GGUF_TYPES[kind].block_bytes
            shape = (shape[0], int(tensor.n_bytes) // (shape[0] * size), size)
            kind = "U8"
        return Header(kind, shape, int(tensor.n_bytes))

    def get_tensor(self, name: str) -> Tensor:
        """Reads a tensor, with the rows and the scales of norms that the model has."""
        tensor = self._tensors[name]
        if _is_type(name, tensor.tensor_type.name):
            return type_tensor(tensor.tensor_type.name)
        found = torch.from_numpy(tensor.data.copy()).reshape(self.header(name).shape)
        heads = self.architecture.heads(tensor.name, *self._heads)
        if heads is not None:
            found = as_halves(found, heads)
        return found - self.architecture.offset(tensor.name) if found.is_floating_point() else found


def _is_type(name: str, kind: str) -> bool:
    return kind in GGUF_TYPES and name.endswith(f".{TYPE}")


@lru_cache(maxsize=1)
def _file(path: Path, changed: int, size: int) -> GGUFFile:
    """Returns a file that was read before as it was read: its header has every token, and takes long."""
    return GGUFFile(path)


@contextmanager
def opened(path: Path) -> Iterator[GGUFFile]:
    """Yields a file to read tensors from.

    Raises:
        ValueError: it is missing, damaged or not known here.
        ImportError: gguf is not installed.
    """
    stat = path.stat()
    yield _file(path, stat.st_mtime_ns, stat.st_size)


def headers(path: Path) -> Iterator[tuple[str, Header]]:
    """Yields what a file says of its tensors, by name."""
    with opened(path) as file:
        yield from ((name, file.header(name)) for name in file.keys())
