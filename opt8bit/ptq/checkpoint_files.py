"""The files of a checkpoint in safetensors: which tensors are where, and what lies beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from opt8bit.ptq.tensor_files import opened

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".mlmodel",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}
INDICES = (".safetensors.index.json", ".bin.index.json")


class CheckpointFiles:
    """A folder whose tensors are read when they are asked for.

    Args:
        folder: with weights in safetensors.

    Attributes:
        folder: as given.
        where: the file of each tensor, by name.

    Raises:
        ValueError: a file is missing, or damaged, or lacks what the index says it has.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = files_of(folder)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors by name, in memory of their own."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.where[name], []).append(name)
        tensors = {}
        for file, inside in by_file.items():
            with opened(file) as handle:  # only while it is read: what is mapped counts as the process's memory
                for name in inside:
                    tensors[name] = handle.get_tensor(name).clone()
        return tensors

    def side_files(self) -> Iterator[Path]:
        """Yields what else belongs to the model, relative to the folder: tokenizer, licence, code, other modules.

        All files but the configuration, weights, here or for other runtimes, and what is hidden. Numbered folders are
        whole: sentence-transformers keeps its further modules there, with their weights.
        """
        for file in sorted(self.folder.rglob("*")):
            path = file.relative_to(self.folder)
            if not file.is_file() or path.parts[0] == "opt8bit" or any(part.startswith(".") for part in path.parts):
                continue
            is_weights = path.suffix in WEIGHTS or path.name.endswith(INDICES) or path.name == "config.json"
            if not is_weights or (len(path.parts) > 1 and re.match(r"\d+_", path.parts[0])):
                yield path

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Reads tensors one after another."""
        for name in names:
            yield name, self.read([name])[name]


def files_of(folder: Path) -> dict[str, Path]:
    """Returns the file that each tensor of a checkpoint is in.

    Raises:
        ValueError: a file is missing, or damaged, or lacks what the index says it has.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        with opened(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    if not index.is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    try:
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error
    for file in sorted(set(where.values())):
        with opened(folder / file) as handle:
            missing = {name for name, place in where.items() if place == file} - set(handle.keys())
        if missing:
            raise ValueError(f"{folder / file} lacks {min(missing)}, which {INDEX} says it has")
    return {name: folder / file for name, file in where.items()}
