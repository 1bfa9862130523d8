"""Writes a corrected ONNX file under its name when everything of it is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from opt8bit.ptq.corrected_onnx.graph import Graph, Model
from opt8bit.ptq.corrected_onnx.library import onnx

RECORD = "opt8bit.correction"  # the key of an entry in a model's metadata


def is_corrected(model: Model) -> bool:
    """Tells whether a model has been corrected before."""
    return any(entry.key == RECORD for entry in model.metadata_props)


def record(model: Model, about: str) -> None:
    """Writes into a model what was done to it, in place of what was done before."""
    entry = next((each for each in model.metadata_props if each.key == RECORD), None)
    if entry is None:
        entry = model.metadata_props.add()
        entry.key = RECORD
    entry.value = about


def check_output(output: Path, source: Graph) -> None:
    """Checks that a corrected file can be written.

    Args:
        output: the file.
        source: the model that is corrected.

    Raises:
        FileExistsError: there is something at ``output``, or where a file beside it would be.
        ValueError: weights are in a file outside of the model's folder, or a link stands for one.
    """
    for path in (output, *(target for _, target in _beside(output, source))):
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists: give another place for the result")


def write_onnx(model: Model, source: Graph, output: Path, check: Callable[[Path], None]) -> None:
    """Writes a model, and copies the files in which its weights are.

    In the source's own folder the result shares these files with the source.

    Args:
        model: the corrected one.
        source: the one that it was made of.
        output: the file.
        check: of the written file; what it raises leaves nothing behind.

    Raises:
        FileExistsError, ValueError: as of :func:`check_output`.
        OSError: a file cannot be written.
    """
    check_output(output, source)
    missing = [parent for parent in output.parents if not parent.exists()]
    partial = output.with_name(f".{output.name}.partial")
    made = [partial]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, target in _beside(output, source):
            target.parent.mkdir(parents=True, exist_ok=True)
            made.append(target)
            shutil.copyfile(path, target)
        partial.write_bytes(model.SerializeToString())
        check(partial)
        os.rename(partial, output)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _beside(output: Path, source: Graph) -> Iterator[tuple[Path, Path]]:
    """Yields each file that has weights of a model, and where it goes, or none where it can stay."""
    if output.parent.resolve() == source.folder.resolve():
        return
    for place in sorted(_locations(source)):
        path = source.folder / place
        if PurePath(place).is_absolute() or ".." in PurePath(place).parts:
            raise ValueError(f"{place} holds weights, and is outside of the model's folder")
        if not path.is_file() or path.is_symlink():
            raise ValueError(f"{path} holds weights, and is missing or a link: put the files themselves in one folder")
        yield path, output.parent / place


def _locations(source: Graph) -> set[str]:
    """Returns the names of the files that hold weights of a model."""
    external = onnx().TensorProto.EXTERNAL
    tensors = list(source.model.graph.initializer)
    return {
        entry.value
        for tensor in tensors
        if tensor.data_location == external
        for entry in tensor.external_data
        if entry.key == "location"
    }
