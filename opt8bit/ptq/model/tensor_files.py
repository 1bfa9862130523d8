"""Files in the safetensors format; what is wrong with one is told by its name."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
ALIGNMENT = 8  # bytes, of the largest dtype


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """
    Raises:
        OSError: it cannot be written.
        ImportError: safetensors is not installed.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    package = _package()
    try:
        importlib.import_module("safetensors.torch").save_file(contiguous, path, metadata=dict(metadata or {}))
    except package.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns a tensor's elements in row-major order, as they are in memory."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
    flat.view(tensor.shape).copy_(tensor.detach())
    return memoryview(flat.view(torch.uint8).numpy().data).cast("B") if flat.numel() else memoryview(b"")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Adds the file's name to errors of writing it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error


class Writer:
    """Writes one file tensor by tensor, in memory none but those of a size that would leave others unaligned.

    Args:
        path: of the file. Until :meth:`close` there is another beside it, with the tensors' bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._data = path, path.with_suffix(".data")
        self._data.touch()
        self._filled = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._last: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """
        Raises:
            OSError: it cannot be written.
            ValueError: its dtype is none of :data:`DTYPES`.
        """
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
        self.names.append(name)
        self.bytes += tensor.nbytes
        if tensor.nbytes % ALIGNMENT:
            self._last[name] = tensor
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        data = bytes_of(tensor)
        with writing(self._data), self._data.open("ab") as file:
            file.write(data)
        start, self._filled = self._filled, self._filled + len(data)
        offsets = [start, self._filled]
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def close(self) -> None:
        """Writes what is left, and puts the header in front.

        Raises:
            OSError: it cannot be written.
        """
        for name, tensor in sorted(self._last.items(), key=lambda item: -item[1].element_size()):
            self._append(name, tensor)
        header = json.dumps(self._header).encode()
        header += b" " * (-len(header) % ALIGNMENT)
        with writing(self._path), self._path.open("wb") as whole, self._data.open("rb") as data:
            whole.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(data, whole, 2**24)
        self._data.unlink()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yields a file to read tensors from. What is read may be mapped, and is the process's memory until the end.

    Raises:
        ValueError: it is missing or damaged.
        ImportError: safetensors is not installed.
    """
    package = _package()
    try:
        handle = package.safe_open(path, "pt")
    except (OSError, package.SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    with handle as file:
        yield file


class Header(NamedTuple):
    """Holds what a file says of one of its tensors."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    bytes: int


def headers(path: Path) -> Iterator[tuple[str, Header]]:
    """Reads what a file says of its tensors, by name."""
    for name, entry in raw_header(path)[0].items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, Header(entry["dtype"], tuple(entry["shape"]), end - start)


def raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns a file's header as it is, and the bytes before the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _package() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'opt8bit[compress]'") from error
