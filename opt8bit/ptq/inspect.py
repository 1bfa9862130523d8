"""Lists what is inside a checkpoint, from its files' headers and scales: layers, grids, biases, size, single codes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from opt8bit.ptq.export import format_of
from opt8bit.ptq.export.checkpoint_format import CheckpointFormat, StoredCodes, StoredLayer
from opt8bit.ptq.export.installed import Codes, not_loaded_here
from opt8bit.ptq.model.checkpoint_files import files_of, opened
from opt8bit.ptq.model.checkpoint_files import headers as headers_of
from opt8bit.ptq.model.packed.checkpoint import Packed, packed_checkpoint
from opt8bit.ptq.model.packed.layout import Unpacked
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.recipe.registry import FORMATS
from opt8bit.recipe.runtimes import PACKED


class UnknownFormat(ValueError):
    """A checkpoint is of a format that is not written here."""


@dataclass
class Contents:
    """A checkpoint.

    Attributes:
        format: "compressed-tensors", "gptq" ...; "dense" where the configuration names none.
        tensors: all that its files have, by name.
        layers: its packed matrices by name; of a dense one all matrices.
        other_bytes: of everything else.
        other_original_bytes: of everything else with no number at more than 16 bits.
        original_bytes: of all, with every weight of the layers at 16 bits, and nothing else at more.
    """

    format: str
    tensors: Mapping[str, Header]
    layers: dict[str, StoredLayer] = field(default_factory=dict)
    other_bytes: int = 0
    other_original_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        return self.other_bytes + sum(layer.stored_bytes for layer in self.layers.values())

    @property
    def original_bytes(self) -> int:
        return self.other_original_bytes + sum(2 * layer.weights for layer in self.layers.values())

    def not_loaded_here(self) -> list[str]:
        """Returns what the installed packages do not load of it, and which can, in lines."""
        if not FORMATS[self.format].is_read_by_transformers:
            return [f"transformers does not load the format {self.format}"]
        if self.format != PACKED:
            return []
        packed = [layer for layer in self.layers.values() if layer.bits]
        return not_loaded_here(
            Codes(layer.bits or 0, layer.grid != "asymmetric", layer.whole_codes) for layer in packed
        )


def inspect(folder: str | Path) -> Contents:
    """Reads the headers of a checkpoint's files, and of what is packed the scales.

    Raises:
        UnknownFormat: it is of none of :data:`FORMATS`.
        ValueError: a file is missing or damaged.
    """
    folder = Path(folder)
    name, format, quantization = _format(folder / "config.json")
    files = files_of(folder)
    headers = {name: header for file in set(files.values()) for name, header in headers_of(file)}
    contents = Contents(name, headers)
    packed = any(name.rpartition(".")[2] == format.parts[0] for name in headers)
    for owner, parts in sorted(_by_owner(headers).items()):
        others = dict(parts)
        layer = _layer(format, owner, parts, files, quantization) if packed else None
        if layer is not None:
            contents.layers[owner] = layer
            for part in parts.keys() & set(format.parts):
                del others[part]
        contents.other_bytes += sum(other.bytes for other in others.values())
        contents.other_original_bytes += sum(min(other.bytes, 2 * math.prod(other.shape)) for other in others.values())
    return contents


def unpacked_weight(folder: str | Path, layer: str) -> Unpacked:
    """Reads the codes of one packed layer of a checkpoint, and what they stand for.

    Args:
        folder: of the checkpoint.
        layer: its name there, one of :attr:`Contents.layers` with ``bits``.

    Raises:
        ValueError: a file is missing or damaged, or the layer is not packed.
    """
    files = files_of(Path(folder))
    packed = packed_checkpoint(Path(folder), files)
    name = f"{layer}.weight"
    if not isinstance(packed, Packed) or name not in packed.names or packed.parts(name) == (name,):
        raise ValueError(f"{layer} is not packed in {folder}")
    tensors = {}
    for part in packed.parts(name):
        with opened(files[part]) as file:
            tensors[part] = file.get_tensor(part)
    return packed.unpacked(name, tensors)


def _format(path: Path) -> tuple[str, CheckpointFormat, Any]:
    """Returns the name of a checkpoint's format, the format and the quantization header."""
    try:
        config = json.loads(path.read_text())
        format, quantization = format_of(config), config.get("quantization_config")
        name = "dense" if quantization is None else quantization["quant_method"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if format is None:
        raise UnknownFormat(f"{path} is of the format {name}: only {', '.join(FORMATS)} can be inspected")
    return name, format, quantization


def _by_owner(headers: Mapping[str, Header]) -> dict[str, dict[str, Header]]:
    owners: dict[str, dict[str, Header]] = {}
    for name, header in headers.items():
        owner, _, own = name.rpartition(".")
        owners.setdefault(owner, {})[own] = header
    return owners


def _layer(
    format: CheckpointFormat, owner: str, parts: Mapping[str, Header], files: Mapping[str, Path], quantization: Any
) -> StoredLayer | None:
    """
    Raises:
        ValueError: a part of its weight is not there.
    """

    def read(part: str) -> Tensor:
        name = f"{owner}.{part}"
        with opened(files[name]) as file:
            return file.get_tensor(name)

    try:
        found = format.shape_and_bits(parts, read)
    except ValueError as error:
        raise ValueError(f"{files[f'{owner}.{format.parts[0]}']}: {owner} has {error}") from error
    if found is None:
        return None
    shape, bits = found
    stored = sum(parts[part].bytes for part in parts.keys() & set(format.parts))
    if bits is None:
        return StoredLayer(shape, None, None, stored, "bias" in parts)
    codes = format.codes_of(owner, shape[1], parts, quantization) or StoredCodes(bits)
    return StoredLayer(shape, codes.bits, format.grid_of(parts, read), stored, "bias" in parts, codes.whole_codes)
