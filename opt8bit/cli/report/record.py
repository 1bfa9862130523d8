"""Collects what a compressed model's folder records, and what its files hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError
from opt8bit.ptq.corrected_checkpoint.recognition import RECORD as CORRECTION
from opt8bit.ptq.export.source_record import read_record
from opt8bit.ptq.inspect import Contents, inspect
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.report import FOLDER, REPORT, RUN, StoredReport, read_report
from opt8bit.recipe.runtimes import DENSE

ELEMENT_BITS = re.compile(r"\d+")  # in safetensors' name of a dtype: 8 in F8_E4M3


@dataclass(frozen=True)
class Record:
    """A compressed model.

    Attributes:
        folder: that it is in.
        report: of the compression.
        contents: of its files.
        source_bytes: of the source's tensors as they were read; None where they are not recorded.
        run: what is recorded of the run besides; empty where nothing is.
        correction: the record of a later ``opt8bit correct``; None where there was none.
    """

    folder: Path
    report: StoredReport
    contents: Contents
    source_bytes: int | None
    run: Mapping[str, Any]
    correction: Mapping[str, Any] | None

    @property
    def is_dense(self) -> bool:
        """Whether it holds weights, and no codes."""
        return self.contents.format == DENSE

    @cached_property
    def kinds(self) -> dict[str, list[LayerReport]]:
        """The layers by :func:`kind_of` their names, in the model's order."""
        found: dict[str, list[LayerReport]] = {}
        for layer in sorted(self.report.layers, key=lambda layer: numbers_of(layer.name)):
            found.setdefault(kind_of(layer.name), []).append(layer)
        return found


def numbers_of(name: str) -> list[int]:
    """Returns the places in lists of modules that a layer's name has: first that of its block."""
    return [int(part) for part in name.split(".") if part.isdecimal()]


def kind_of(name: str) -> str:
    """Returns what layers of one kind have in common: their name in the block, a star for each further number.

    Example:
        >>> kind_of("model.layers.3.mlp.experts.17.w1")
        'mlp.experts.*.w1'
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    own = parts[numbers[0] + 1 :] if numbers else parts
    return ".".join("*" if part.isdecimal() else part for part in own)


def read(folder: Path) -> Record:
    """Reads all there is.

    Raises:
        CommandError: the folder is not one that ``opt8bit compress`` has written, or a file is damaged.
    """
    if not folder.is_dir():
        raise CommandError(f"{folder} is not a folder")
    try:
        report = read_report(folder)
        contents, source = inspect(folder), read_record(folder)
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    if not isinstance(report.about.get("model"), str) or not isinstance(report.about.get("recipe"), dict):
        raise CommandError(f"{folder / FOLDER / REPORT} names no model or no recipe")
    source_bytes = None
    if source is not None:
        source_bytes = sum(_bytes(dtype) * math.prod(shape) for dtype, shape in source.tensors.values())
    correction = folder / FOLDER / CORRECTION
    return Record(
        folder=folder,
        report=report,
        contents=contents,
        source_bytes=source_bytes,
        run=_object(folder / FOLDER / RUN) or {},
        correction=_object(correction),
    )


def _bytes(dtype: str) -> int:
    bits = ELEMENT_BITS.search(dtype)
    return 1 if bits is None else int(bits[0]) // 8  # BOOL has no number


def _object(path: Path) -> dict[str, Any] | None:
    """Returns the object in a file of JSON, or None where there is no file.

    Raises:
        CommandError: it is no object.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CommandError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CommandError(f"{path} is damaged: it has {type(found).__name__}, an object was expected")
    return found
