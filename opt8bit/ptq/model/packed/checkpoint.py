"""A checkpoint whose weights are packed, read as one of plain weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt8bit.ptq.model.coded import CodedWeights, Dtypes
from opt8bit.ptq.model.packed.awq import AWQLayout
from opt8bit.ptq.model.packed.compressed_tensors import CompressedTensorsLayout
from opt8bit.ptq.model.packed.gguf import GGUFLayout
from opt8bit.ptq.model.packed.gptq import GPTQLayout
from opt8bit.ptq.model.packed.layout import Layout, Unpacked
from opt8bit.ptq.model.packed.mlx import MLXLayout
from opt8bit.ptq.model.quantization_header import dtype_of, header_of, method_of
from opt8bit.ptq.model.scaled import read_json, refuse_narrow, scaled_checkpoint

AUTO_ROUND: Mapping[str, Layout] = {  # by its header's packing_format
    "auto_round": GPTQLayout(zero_shift=0),
    "auto_round:gptqmodel": GPTQLayout(zero_shift=0),
    "auto_round:auto_gptq": GPTQLayout(zero_shift=1),
    "auto_round:auto_awq": AWQLayout(),
}


class Packed(CodedWeights):
    """A checkpoint's packed weights. What is stored beside them is as it is stored.

    Args:
        layout: of the weights.
        stored: names of all tensors in the checkpoint.
        dtype: of the weights.
        rounds_inputs: whether a server rounds the inputs of layers, too.

    Raises:
        ValueError: a weight is there twice, or none is packed.

    Example:
        >>> packed = Packed(AWQLayout(), ["a.qweight", "a.qzeros", "a.scales", "b.weight"], torch.float16)
        >>> sorted(packed.names), packed.parts("a.weight")
        (['a.weight', 'b.weight'], ('a.qweight', 'a.qzeros', 'a.scales'))
    """

    def __init__(
        self, layout: Layout, stored: Collection[str], dtype: torch.dtype, rounds_inputs: bool = False
    ) -> None:
        self.layout, self.dtype, self.rounds_inputs = layout, dtype, rounds_inputs
        stored, end = set(stored), f".{layout.mark or layout.codes}"
        layers = [name.removesuffix(end) for name in stored if name.endswith(end)]
        kinds = (layout.codes, *layout.others)
        parts = {layer: [f"{layer}.{kind}" for kind in kinds if f"{layer}.{kind}" in stored] for layer in layers}
        self._parts = {f"{layer}.weight": tuple(names) for layer, names in parts.items()}
        gone = {name for names in self._parts.values() for name in names}
        twice = sorted(self._parts.keys() & (stored - gone))
        if twice:
            raise ValueError(f"{twice[0]} is stored both as it is and packed")
        if not layers:
            raise ValueError(f"the header says that weights are packed, and the checkpoint has no {end[1:]}")
        self.names = frozenset((stored - gone) | self._parts.keys())

    def parts(self, name: str) -> tuple[str, ...]:
        return self._parts.get(name, (name,))

    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if name not in self._parts:
            return tensors[name]
        with _naming(name):
            values = self.layout.weight(*self._layer_and_parts(name, tensors)).to(self.dtype)
        if not values.isfinite().all():
            raise ValueError(f"{name} has values that are not finite in {self.dtype}")
        return values

    def unpacked(self, name: str, tensors: Mapping[str, Tensor]) -> Unpacked:
        """Returns a packed weight as codes and what they stand for.

        Args:
            name: of the weight.
            tensors: its :meth:`parts`, by name.

        Raises:
            ValueError: it cannot be unpacked; the message names the layer.
        """
        with _naming(name):
            return self.layout.unpacked(*self._layer_and_parts(name, tensors))

    def _layer_and_parts(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """Returns a weight's layer, and its tensors by what stands behind the layer's name."""
        layer = name.removesuffix(".weight")
        return layer, {part.removeprefix(f"{layer}."): tensors[part] for part in self._parts[name]}

    def check(self, dtypes: Dtypes) -> None:
        refuse_narrow(dtypes)

    def notice(self) -> str | None:
        return None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds the name of the layer to errors of unpacking its weight."""
    try:
        yield
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{name.removesuffix('.weight')} cannot be unpacked: {error}") from error


def packed_checkpoint(folder: Path, stored: Collection[str]) -> CodedWeights | None:
    """Returns how a checkpoint's weights are packed or scaled, or None where no file in its folder has a header.

    Raises:
        ValueError: they are so in a way that is not known here, or a file is damaged.
    """
    config = read_json(folder / "config.json") or {}
    header = header_of(config)
    if header is None:
        return scaled_checkpoint(folder, stored)  # there may be a file for the header alone
    method = method_of(header)
    if method == "compressed-tensors" and not any(name.endswith(".weight_packed") for name in stored):
        return scaled_checkpoint(folder, stored)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"the weights are quantized by {method}: only the layouts of {known} are read")
    layout, groups = METHODS[method](header), header.get("config_groups") or {}
    rounds_inputs = any(group.get("input_activations") for group in groups.values())
    return Packed(layout, stored, dtype_of(config), rounds_inputs)


def _auto_round(header: Mapping[str, Any]) -> Layout:
    """
    Raises:
        ValueError: it is of another layout.
    """
    name = str(header.get("packing_format") or header.get("backend") or "auto_round")
    if name not in AUTO_ROUND:
        raise ValueError(f"AutoRound's packing_format must be one of {', '.join(AUTO_ROUND)}, got {name!r}")
    return AUTO_ROUND[name]


METHODS: Mapping[str, Callable[[Mapping[str, Any]], Layout]] = {
    "compressed-tensors": CompressedTensorsLayout.of,
    "gptq": GPTQLayout.of,
    "awq": AWQLayout.of,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "mlx": lambda header: MLXLayout(),
    "gguf": lambda header: GGUFLayout(),
}
