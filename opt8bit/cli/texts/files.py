"""Files as text: decompressed, decoded and cut into lines, a chunk at a time."""

from __future__ import annotations

import codecs
import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError

CHUNK = 1 << 16  # bytes read at once
MODULES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}  # of Python, that open compressed files
COMPRESSED = (*MODULES, ".zst")
BEGINNINGS = {  # of files that are no text, and what to do about each
    b"\x1f\x8b": "it is compressed by gzip: its name must end in .gz",
    b"BZh": "it is compressed by bzip2: its name must end in .bz2",
    b"\xfd7zXZ": "it is compressed by xz: its name must end in .xz",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: its name must end in .zst",
    b"PAR1": "it is a Parquet file: its name must end in .parquet",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"%PDF": "it is a PDF: give its text",
    b"\xff\xfe": "it is UTF-16: convert it",
    b"\xfe\xff": "it is UTF-16: convert it",
}


def kind(path: Path) -> str:
    """Returns the suffix that tells a file's format, in lower case, without that of a compression."""
    names = [suffix.lower() for suffix in path.suffixes]
    if names and names[-1] in COMPRESSED:
        names.pop()
    return names[-1] if names else ""


def characters(path: Path) -> Iterator[str]:
    """Yields a file's text in chunks, with line ends as Python reads them and without a byte order mark.

    Raises:
        CommandError: the file cannot be read, is broken or binary, or is not UTF-8.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    chunks = _bytes(path)
    chunk = next(chunks, b"")
    what = next((what for beginning, what in BEGINNINGS.items() if chunk.startswith(beginning)), "it is no text")
    if b"\0" in chunk:
        line = chunk[: chunk.index(b"\0")].count(b"\n") + 1
        raise CommandError(f"{path}, line {line}: a zero byte: {what}")
    line = 1
    while True:
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            byte = f"byte 0x{error.object[error.start]:02x}, {error.reason}"
            raise CommandError(f"{path}, line {line}: not UTF-8: {byte}: {what}") from error
        line += text.count("\n")
        if text:
            yield text
        if not chunk:
            return
        chunk = next(chunks, b"")


def lines(path: Path) -> Iterator[str]:
    """Yields a file's lines with their ends. Only line feeds end them: JSON may hold other separators in a string.

    Raises:
        CommandError: as :func:`characters`.
    """
    begun: list[str] = []
    for chunk in characters(path):
        first, *others = chunk.split("\n")
        begun.append(first)
        for other in others:
            yield "".join(begun) + "\n"
            begun = [other]
    last = "".join(begun)
    if last:
        yield last


def _bytes(path: Path) -> Iterator[bytes]:
    """Yields the bytes that a file holds, in chunks that are not empty."""
    try:
        yield from filter(None, _opened(path))
    except CommandError:
        raise
    except Exception as error:  # each decompressor has its own for files that are broken
        raise CommandError(f"cannot read {str(path)!r}: {error}") from error


def _opened(path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        yield from _zstandard(path)
        return
    opener: Callable[..., Any] = importlib.import_module(MODULES[suffix]).open if suffix in MODULES else open
    with opener(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _zstandard(path: Path) -> Iterator[bytes]:
    for name in ("compression.zstd", "backports.zstd"):  # Python's own from 3.14 on, and the same for older ones
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        with module.open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
        return
    try:
        module = importlib.import_module("zstandard")
    except ImportError as error:
        raise CommandError(f"{path}: to read .zst, pip install zstandard, or use Python 3.14") from error
    with path.open("rb") as file:
        yield from _frames(module.ZstdDecompressor(max_window_size=1 << 31), file)


def _frames(decompressor: Any, file: Any) -> Iterator[bytes]:
    """Yields what all frames of a file hold: its own reader would end after the first, and before a broken end."""
    frame = decompressor.decompressobj()
    while chunk := file.read(CHUNK):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends too early")
