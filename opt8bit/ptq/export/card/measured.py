"""Says what the figures of a model card were measured by, and how large the files are."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from opt8bit.ptq.export.source_record import read_record
from opt8bit.ptq.model.checkpoint_files import files_of
from opt8bit.ptq.model.products import CPUINFO

PACKAGES = ("opt8bit", "torch", "transformers")


class Size(NamedTuple):
    """The size of a checkpoint's weight files.

    Attributes:
        bytes: of the files, with their headers.
        parameters: that they hold, each tensor of the source counted once.
    """

    bytes: int
    parameters: int

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes / self.parameters


def size_of(folder: Path, *, keeps_others: bool) -> Size:
    """Counts what was written.

    Args:
        folder: of a checkpoint, with the record of its source's tensors.
        keeps_others: whether it has the tensors that the model does not load.
    """
    record = read_record(folder)
    assert record is not None
    left = () if keeps_others else record.without_place
    parameters = sum(math.prod(shape) for name, (_, shape) in record.tensors.items() if name not in left)
    return Size(sum(file.stat().st_size for file in set(files_of(folder).values())), parameters)


def measured_by() -> dict[str, str]:
    """Returns the versions of packages, by name, and the "processor" of this machine."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "processor": _processor()}


def said(measured: Mapping[str, str]) -> str:
    """Returns the same in words."""
    packages = [f"{name} {number}" for name, number in measured.items() if name != "processor"]
    return f"{', '.join(packages)}; {measured['processor']}"


def _processor() -> str:
    if CPUINFO.exists():  # of Linux, where platform only knows the architecture
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
