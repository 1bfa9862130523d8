"""Checks that a converted checkpoint has what its source has."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from opt8bit.ptq.conversion.codes import codes_of, is_packed
from opt8bit.ptq.export.source_record import read_record
from opt8bit.ptq.model.checkpoint_files import CheckpointFiles
from opt8bit.ptq.model.packed.layout import Unpacked


def check_same(source: CheckpointFiles, folder: Path, again: Collection[str]) -> None:
    """Reads what was written, and compares it with its source: codes, scales, zero points, and all other tensors.

    Args:
        source: files, to be unpacked.
        folder: that was written.
        again: names of weights in the checkpoint that were rounded again, which are not compared.

    Raises:
        ValueError: something differs; the message names the tensor.
    """
    written, record = CheckpointFiles(folder, unpack=True), read_record(folder)
    assert record is not None
    for name in sorted(source.where.keys() - set(again)):
        if name not in written.where:
            if name not in record.without_place:
                raise ValueError(f"{name} is lost in what was written")
        elif is_packed(written, name):
            _check_codes(name, codes_of(source, name), codes_of(written, name))
        elif name not in record.changed:  # those are stored in the format's own dtype
            _check_tensor(name, source, written)


def _check_codes(name: str, source: Unpacked, written: Unpacked) -> None:
    """
    Raises:
        ValueError: a weight has other codes, or codes stand for something else.
    """
    fields = {"codes": (source.codes, written.codes)}
    for field in ("scale", "zero_point"):
        # Of each input, as groups may be smaller in what was written.
        fields[field] = tuple(getattr(each, field).float()[:, each.group.long()] for each in (source, written))
    for field, (expected, found) in fields.items():
        if not torch.equal(expected, found):
            raise ValueError(f"{name} has another {field} in what was written")


def _check_tensor(name: str, source: CheckpointFiles, written: CheckpointFiles) -> None:
    """
    Raises:
        ValueError: a tensor is another one.
    """
    expected, found = source.read([name])[name], written.read([name])[name]
    if expected.dtype != found.dtype or not torch.equal(expected, found):
        raise ValueError(f"{name} is another tensor in what was written")
