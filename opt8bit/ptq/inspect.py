"""What is inside a checkpoint, told from its files' headers: layers, widths, biases, size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opt8bit.ptq import tensor_files
from opt8bit.ptq.source import files_of
from opt8bit.quant.packing import WORD

KNOWN = ("compressed-tensors", "gptq", "dense")
PACKED = {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "qweight", "qzeros", "scales", "g_idx"}


@dataclass
class Layer:
    """A matrix and what is stored for it.

    Attributes:
        shape: (out, in).
        bits: of a code, where the weight is packed.
        stored_bytes: for the weight: codes, scales, zero points.
        bias: whether there is one.
    """

    shape: tuple[int, int]
    bits: int | None
    stored_bytes: int = 0
    bias: bool = False

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.weights


@dataclass
class Contents:
    """A checkpoint.

    Attributes:
        format: "compressed-tensors", "gptq" ...; "dense" where the configuration names none.
        layers: its packed matrices by name; of a dense one all matrices.
        other_bytes: of everything else.
        original_bytes: of all, with every packed weight at 16 bits.
    """

    format: str
    layers: dict[str, Layer] = field(default_factory=dict)
    other_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        return self.other_bytes + sum(layer.stored_bytes for layer in self.layers.values())

    @property
    def original_bytes(self) -> int:
        packed = [layer for layer in self.layers.values() if layer.bits]
        return self.stored_bytes + sum(2 * layer.weights - layer.stored_bytes for layer in packed)


def inspect(folder: str | Path) -> Contents:
    """Reads the headers of a checkpoint's files.

    Raises:
        ValueError: a file is missing or damaged, or of a format that is not known here.
    """
    folder = Path(folder)
    contents = Contents(_format(folder / "config.json"))
    files = files_of(folder)
    headers = {name: header for file in set(files.values()) for name, header in tensor_files.headers(file)}
    packed = {name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in ("weight_packed", "qweight")}
    for owner, parts in sorted(_by_owner(headers).items()):
        stored = {key: size for key, (_, size) in parts.items()}
        if owner in packed:
            layer = _of_gptq(parts) if "qweight" in parts else _of_compressed_tensors(owner, parts, files)
            layer.stored_bytes = sum(size for key, size in stored.items() if key in PACKED)
        elif not packed and len(parts.get("weight", ((), 0))[0]) == 2:
            rows, columns = parts["weight"][0]
            layer = Layer((rows, columns), None, stored["weight"])
        else:
            contents.other_bytes += sum(stored.values())
            continue
        layer.bias = "bias" in parts
        contents.other_bytes += sum(stored.values()) - layer.stored_bytes
        contents.layers[owner] = layer
    return contents


def _format(path: Path) -> str:
    try:
        config = json.loads(path.read_text())
        quantization = config.get("quantization_config")
        name = "dense" if quantization is None else quantization["quant_method"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if name not in KNOWN:
        raise ValueError(f"{path} is of the format {name}: only {', '.join(KNOWN)} can be inspected")
    return name


Parts = Mapping[str, "tuple[tuple[int, ...], int]"]  # shape and bytes by name, or the last part of it


def _by_owner(headers: Parts) -> dict[str, Parts]:
    owners: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {}
    for name, header in headers.items():
        owner, _, own = name.rpartition(".")
        owners.setdefault(owner, {})[own] = header
    return dict(owners)


def _of_gptq(parts: Parts) -> Layer:
    words, rows = parts["qweight"][0]
    (columns,) = parts["g_idx"][0]
    return Layer((rows, columns), WORD * words // columns)


def _of_compressed_tensors(owner: str, parts: Parts, files: Mapping[str, Path]) -> Layer:
    shape = f"{owner}.weight_shape"
    with tensor_files.opened(files[shape]) as file:
        rows, columns = file.get_tensor(shape).tolist()
    return Layer((rows, columns), WORD * parts["weight_packed"][0][1] // columns)
