"""The files of a checkpoint in safetensors: which tensors are where, and what lies beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from opt8bit.ptq.model import tensor_files
from opt8bit.ptq.model.gguf import reading as gguf_files
from opt8bit.ptq.model.packed.checkpoint import packed_checkpoint
from opt8bit.ptq.model.quantization_header import without_header
from opt8bit.ptq.model.scaled import refuse_narrow, scaled_checkpoint, warn_of_dropped
from opt8bit.ptq.model.tensor_files import Header

CONFIG, QUANTIZATION = "config.json", "hf_quant_config.json"
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

    Weights in fp8 or int8 are read as what they stand for, if a header says how they are scaled.

    Args:
        folder: with weights in safetensors.
        unpack: whether packed weights are read as what they stand for, too.

    Attributes:
        folder: as given.
        where: the file of each tensor, by name.
        stored: the file of each tensor that is there, those of codes and scales included.
        coded: how weights are scaled or packed, if they are.

    Raises:
        ValueError: a file is missing, or damaged, or lacks what the index says it has; or weights are more than scaled,
            and not to be unpacked.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: Path, *, unpack: bool = False) -> None:
        self.folder = folder
        self.stored = files_of(folder)
        self.coded = packed_checkpoint(folder, self.stored) if unpack else scaled_checkpoint(folder, self.stored)
        self._keeps_codes = unpack  # as who reads packed weights writes them again
        self.where = dict(self.stored)
        if self.coded is not None:
            by_codes = {self.coded.parts(name)[0]: name for name in self.coded.names}
            self.where = {by_codes[there]: file for there, file in self.stored.items() if there in by_codes}

    def config(self) -> dict[str, Any]:
        """Returns the configuration in its own words, as that of a model that is not quantized."""
        config = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        return config if self.coded is None else without_header(config)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors by name, in memory of their own."""
        wanted = list(names)
        parts = {name: (name,) if self.coded is None else self.coded.parts(name) for name in wanted}
        by_file: dict[Path, list[str]] = {}
        for part in dict.fromkeys(part for name in wanted for part in parts[name]):
            by_file.setdefault(self.stored[part], []).append(part)
        stored = {}
        for file, inside in by_file.items():
            with opened(file) as handle:  # only while it is read: what is mapped counts as the process's memory
                for part in inside:
                    stored[part] = handle.get_tensor(part).clone()
        if self.coded is None:
            return {name: stored[name] for name in wanted}
        return {name: self.coded.weight(name, stored) for name in wanted}

    def check_dtypes(self, names: Collection[str]) -> None:
        """Checks that the weights of a model are numbers, or codes whose scales are known.

        Args:
            names: of parameters.

        Raises:
            ValueError: one is neither.

        Warns:
            UserWarning: weights are dequantized, and what a server would quantize beside them is not kept.
        """
        dtypes = {}
        for file in {self.where[name] for name in names}:
            dtypes |= {name: header.dtype for name, header in headers(file) if name in names}
        if self.coded is None:
            refuse_narrow(dtypes)
        else:
            self.coded.check(dtypes)
            if not self._keeps_codes:
                warn_of_dropped(self.coded)

    def side_files(self) -> Iterator[Path]:
        """Yields what else belongs to the model, relative to the folder: tokenizer, licence, code, other modules.

        All files but the configuration, weights, here or for other runtimes, and what is hidden. Numbered folders are
        whole: sentence-transformers keeps its further modules there, with their weights.
        """
        for file in sorted(self.folder.rglob("*")):
            path = file.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in path.parts)
            if not file.is_file() or hidden or path.parts[0] == "opt8bit" or path.name == QUANTIZATION:
                continue
            is_weights = path.suffix in WEIGHTS or path.name.endswith(INDICES) or path.name == CONFIG
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
    index = folder / INDEX
    for single in (folder / SINGLE, folder / gguf_files.FILE):
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


def opened(path: Path) -> AbstractContextManager[Any]:
    """Returns a context that has a file to read tensors from, in safetensors or GGUF.

    Raises:
        ValueError: it is missing or damaged.
        ImportError: the package that reads it is not installed.
    """
    return gguf_files.opened(path) if path.suffix == gguf_files.SUFFIX else tensor_files.opened(path)


def headers(path: Path) -> Iterator[tuple[str, Header]]:
    """Returns what a file, in safetensors or GGUF, says of its tensors, by name."""
    return gguf_files.headers(path) if path.suffix == gguf_files.SUFFIX else tensor_files.headers(path)
