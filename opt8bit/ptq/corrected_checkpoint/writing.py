"""Writes a checkpoint with other biases; codes, scales and everything else stay as they are, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.corrected_checkpoint.recognition import RECORD
from opt8bit.ptq.export.added import add_tensors
from opt8bit.ptq.export.configuration import with_places, write_configuration
from opt8bit.ptq.export.huggingface import copy_side_files
from opt8bit.ptq.export.source_record import RECORD as SOURCE_RECORD
from opt8bit.ptq.export.source_record import SourceRecord
from opt8bit.ptq.model.bias_places import Place, Places
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.model.checkpoint_files import CONFIG, QUANTIZATION, CheckpointFiles
from opt8bit.ptq.model.source import FromFiles
from opt8bit.ptq.model.tensor_files import headers
from opt8bit.ptq.report import FOLDER, PAGE, PROBE, valid_json, write_probe
from opt8bit.ptq.tasks.task import Probe


class Bias(NamedTuple):
    """A bias as it is stored.

    Attributes:
        name: in the checkpoint.
        values: (out,), in the dtype that it is stored in.
        beside: a tensor of the checkpoint in whose file it goes.
        is_new: whether whoever loads the checkpoint found none there before.
        is_zero: whether it is there only because a switch gives its layer one, too.
    """

    name: str
    values: Tensor
    beside: str
    is_new: bool
    is_zero: bool


def stored_biases(source: FromFiles, quantized: nn.Module, places: Places, kept: Collection[str]) -> dict[str, Bias]:
    """Returns the biases to write, by layer.

    A switch gives all its layers biases, and servers fuse some of these into one: the others get zeros.

    Args:
        source: of the checkpoint.
        quantized: the corrected model.
        places: of biases.
        kept: names of the layers whose biases correct something.
    """
    switches = switches_of(places, kept)
    found = {}
    for name, place in places.items():
        layer = quantized.get_submodule(name)
        has_bias = source.stored_name(f"{name}.bias") is not None
        if name in kept:
            bias = layer.bias
            assert isinstance(bias, Tensor)
            found[name] = _as_stored(source, name, bias.detach(), has_bias, is_zero=False)
        elif place in switches and not has_bias:
            zeros = torch.zeros(len(matrix(layer)), dtype=matrix(layer).dtype)
            found[name] = _as_stored(source, name, zeros, has_bias, is_zero=True)
    return found


def switches_of(places: Places, kept: Iterable[str]) -> list[Place]:
    """Returns the configuration's switches that give layers the biases they got."""
    found = {places[name] for name in kept}
    return sorted(place for place in found if place is not None and place.kind == "switch")


def _as_stored(source: FromFiles, name: str, bias: Tensor, has_bias: bool, *, is_zero: bool) -> Bias:
    files, weight = source.files, source.stored_name(f"{name}.weight")
    assert weight is not None
    own = source.stored_name(f"{name}.bias") if has_bias else None
    if own is not None:
        return Bias(own, bias.to(files.read([own])[own].dtype), own, False, is_zero)
    there = f"{weight.removesuffix('.weight')}.bias"  # which a file may have all the same, with no place to load it to
    codes = weight if files.coded is None else files.coded.parts(weight)[0]
    return Bias(there, bias, there if there in files.stored else codes, True, is_zero)


def write_corrected(
    source: FromFiles,
    folder: Path,
    biases: Collection[Bias],
    switches: Iterable[Place],
    probe: Probe,
    about: Mapping[str, Any],
) -> None:
    """Writes a checkpoint's files into a folder.

    Args:
        source: of the checkpoint.
        folder: that is empty.
        biases: to put into it.
        switches: of the configuration that the biases need.
        probe: what the result is checked by.
        about: the correction, for whoever wants to know.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = source.files
    beside = {bias.name: bias.beside for bias in biases}
    add_tensors(files.stored, folder, {bias.name: bias.values for bias in biases}, beside)
    _write_config(source, folder, switches)
    copy_side_files(files, folder)
    for path in _more_side_files(files.folder):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(files.folder / path, folder / path)
    _record(source, biases).write(folder)
    write_probe(probe, folder)
    (folder / FOLDER / RECORD).write_text(valid_json(about, indent=2) + "\n", encoding="utf-8")


def _write_config(source: FromFiles, folder: Path, switches: Iterable[Place]) -> None:
    """Writes the configuration with the switches on; as it is, byte for byte, where none is needed."""
    path = source.files.folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = with_places(config, source.model, switches)
    if changed == config:
        shutil.copyfile(path, folder / CONFIG)
    else:
        write_configuration(changed, folder)


def _more_side_files(folder: Path) -> Iterator[Path]:
    """Yields what a source's files do not count as side files: the header of its own, and what opt8bit has reported."""
    if (folder / QUANTIZATION).is_file():
        yield Path(QUANTIZATION)
    for file in sorted((folder / FOLDER).glob("*")):
        if file.is_file() and file.name not in (PAGE, PROBE, SOURCE_RECORD, RECORD):
            yield file.relative_to(folder)


def _record(source: FromFiles, biases: Collection[Bias]) -> SourceRecord:
    """Returns what the checkpoint had, to compare with what is written."""
    files: CheckpointFiles = source.files
    found = {name: header for file in set(files.stored.values()) for name, header in headers(file)}
    tensors = {name: (found[name].dtype, found[name].shape) for name in files.stored}
    coded = files.coded
    unloaded = [part for name in source.without_place for part in ((name,) if coded is None else coded.parts(name))]
    added = {bias.name for bias in biases if bias.name not in files.stored}
    return SourceRecord(
        tensors=tensors,
        changed=sorted({bias.name for bias in biases} - added),
        added=sorted(added),
        without_place=sorted(set(unloaded) - {bias.name for bias in biases}),
    )
