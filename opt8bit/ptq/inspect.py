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
        other_original_bytes: of everything else with no number at more than 16 bits.
        original_bytes: of all, with every weight of the layers at 16 bits, and nothing else at more.
    """

    format: str
    layers: dict[str, Layer] = field(default_factory=dict)
    other_bytes: int = 0
    other_original_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        return self.other_bytes + sum(layer.stored_bytes for layer in self.layers.values())

    @property
    def original_bytes(self) -> int:
        return self.other_original_bytes + sum(2 * layer.weights for layer in self.layers.values())


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
        others = dict(parts)
        if owner in packed:
            layer = _packed_layer(owner, parts, files)
            layer.stored_bytes = sum(others.pop(key)[1] for key in PACKED & parts.keys())
        elif not packed and len(parts.get("weight", ((), 0))[0]) == 2:
            (rows, columns), size = others.pop("weight")
            layer = Layer((rows, columns), None, size)
        else:
            layer = None
        if layer is not None:
            layer.bias = "bias" in parts
            contents.layers[owner] = layer
        contents.other_bytes += sum(size for _, size in others.values())
        contents.other_original_bytes += sum(min(size, 2 * math.prod(shape)) for shape, size in others.values())
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


def _packed_layer(owner: str, parts: Parts, files: Mapping[str, Path]) -> Layer:
    """
    Raises:
        ValueError: its shape is not there.
    """
    codes, shape = ("qweight", "g_idx") if "qweight" in parts else ("weight_packed", "weight_shape")
    if shape not in parts:
        raise ValueError(f"{files[f'{owner}.{codes}']} has {owner}.{codes}, but no {owner}.{shape}")
    return _of_gptq(parts) if codes == "qweight" else _of_compressed_tensors(owner, parts, files)


def _of_gptq(parts: Parts) -> Layer:
    words, rows = parts["qweight"][0]
    (columns,) = parts["g_idx"][0]
    return Layer((rows, columns), WORD * words // columns)


def _of_compressed_tensors(owner: str, parts: Parts, files: Mapping[str, Path]) -> Layer:
    shape = f"{owner}.weight_shape"
    with tensor_files.opened(files[shape]) as file:
        rows, columns = file.get_tensor(shape).tolist()
    return Layer((rows, columns), WORD * parts["weight_packed"][0][1] // columns)
