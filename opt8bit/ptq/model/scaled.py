"""Weights stored as 8-bit codes with scales, in fp8 or int8: which tensors they are made of, and their values."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt8bit.ptq.model.coded import CodedWeights, Dtypes
from opt8bit.ptq.model.quantization_header import Block, Header, dtype_of, header_of, scheme_of
from opt8bit.warning import warn

SCALES = ("_scale_inv", "_scale")  # after a weight's name; both are what its codes are multiplied by
ZERO_POINT = "_zero_point"
# Of activations, keys and values: the ends of names that no weight needs.
OF_ACTIVATIONS = (
    "activation_scale",
    *(f".{kind}_{what}" for kind in ("input", "output", "q", "k", "v") for what in ("scale", "zero_point")),
    ".input_scale_ub",
    ".kv_scale",
    ".prob_scale",
    ".prob_output_scale",
)
# Of weights that are more than codes times scales.
MORE = (
    ".weight_packed",
    ".weight_g_idx",
    ".weight_scale_2",
    ".weight_global_scale",
    ".pre_quant_scale",
    ".input_rotation",
    ".qweight",
    ".bitmask",
)
NARROW = frozenset(
    {"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "I8", "U8"}
)
# Names of safetensors for dtypes of torch that codes may have.
SAFETENSORS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I8": "int8",
    "U8": "uint8",
}


class Scaled(CodedWeights):
    """A checkpoint whose weights are codes times scales, as one of its weights: w = (codes - zero_point) · scale.

    The product is that of float32, rounded once to ``dtype``. A scale belongs to a tensor, a row, or a block of the
    size that the header names; the scale's shape says which. The last blocks may be short. What is stored without a
    scale, such as embeddings, norms and layers that were left as they are, is as it is stored.

    Args:
        header: of :func:`header_of`.
        stored: names of all tensors in the checkpoint.
        dtype: of the weights. See :func:`dtype_of`.

    Raises:
        ValueError: the weights are more than scaled.

    Example:
        >>> scaled = Scaled({"quant_method": "fp8"}, ["a.weight", "a.weight_scale", "a.input_scale", "b.weight"])
        >>> sorted(scaled.names), scaled.parts("a.weight")
        (['a.weight', 'b.weight'], ('a.weight', 'a.weight_scale'))
        >>> codes = torch.ones(1, 2).to(torch.float8_e4m3fn)
        >>> scaled.weight("a.weight", {"a.weight": codes, "a.weight_scale": torch.tensor(0.5)})
        tensor([[0.5000, 0.5000]], dtype=torch.bfloat16)
    """

    def __init__(self, header: Header, stored: Collection[str], dtype: torch.dtype = torch.bfloat16) -> None:
        self.scheme, self.dtype = scheme_of(header), dtype
        stored = set(stored)
        more = sorted(name for name in stored if name.endswith(MORE))
        if more:
            raise ValueError(f"the model is quantized already, in more than scales ({more[0]}): compress the original")
        self._scales = _scales(stored)
        zero_points = {name: name + ZERO_POINT for name in self._scales if name + ZERO_POINT in stored}
        self._zero_points = zero_points
        self.rounds_inputs = bool(self._scales) and self.scheme.activations
        gone = {*self._scales.values(), *zero_points.values()}
        self.names = frozenset(name for name in stored - gone if not name.endswith(OF_ACTIVATIONS))

    def parts(self, name: str) -> tuple[str, ...]:
        """Returns the names of the stored tensors that a tensor is made of: itself, its scale and its zero point."""
        others = (self._scales.get(name), self._zero_points.get(name))
        return name, *(other for other in others if other is not None)

    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns a tensor's values.

        Args:
            name: one of ``names``.
            tensors: its parts.

        Raises:
            ValueError: it has codes but no scale, or a scale that is not finite or whose shape does not fit; or its
                values are not finite.
        """
        stored = tensors[name]
        self.check({name: stored.dtype})
        if name not in self._scales:
            return stored
        scale, block = self._fitted(self._scales[name], tensors, stored.shape)
        zero_point = None
        if name in self._zero_points:
            zero_point, _ = self._fitted(self._zero_points[name], tensors, stored.shape)
            if zero_point.shape != scale.shape:
                raise ValueError(f"{self._zero_points[name]} has another shape than {self._scales[name]}")
        values = dequantized(stored, scale, zero_point, block).to(self.dtype)
        if not values.isfinite().all():
            raise ValueError(f"{name} has values that are not finite in {self.dtype}")
        return values

    def check(self, dtypes: Dtypes) -> None:
        """Looks at the dtypes before anything is read.

        Args:
            dtypes: of stored tensors that the model needs.

        Raises:
            ValueError: one has codes but no scale, or a scale but none of the header's codes.
        """
        for name, dtype in dtypes.items():
            if name not in self.names:
                continue
            if name not in self._scales and _is_narrow(dtype):
                wanted = " or ".join(name + end for end in SCALES)
                raise ValueError(f"{name} is stored as {dtype} without its scale, {wanted}")
            if name in self._scales and _torch_name(dtype) not in self.scheme.codes:
                codes = ", ".join(sorted(self.scheme.codes)) or "no codes"
                raise ValueError(f"{name} has a scale, and is stored as {dtype}: the header's weights are {codes}")

    def notice(self) -> str | None:
        """Returns what is lost when only the weights are kept, as a sentence, or None."""
        kinds = {"activations": self.rounds_inputs, "keys and values": self.scheme.cache}
        dropped = [kind for kind, there in kinds.items() if there]
        if not self._scales or not dropped:
            return None
        dtype = str(self.dtype).removeprefix("torch.")
        return f"the weights are dequantized to {dtype}, and the quantization of {' and of '.join(dropped)} is dropped"

    def _fitted(self, name: str, tensors: Mapping[str, Tensor], shape: torch.Size) -> tuple[Tensor, Block]:
        """Returns a scale or zero point in float32, with its weight's dimensions, and the block that it belongs to."""
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        scale = tensors[name]
        if scale.dtype == torch.uint8 and self.scheme.exponents:
            scale = _power_of_two(scale)
        elif not (scale.is_floating_point() or name.endswith(ZERO_POINT)):
            raise ValueError(f"{name} is stored as {scale.dtype}: scales must be floats")
        scale = scale.to(torch.float32)
        if not scale.isfinite().all():
            raise ValueError(f"{name} is not finite")
        fits = _fits(tuple(scale.shape), tuple(shape), self.scheme.blocks)
        if len(fits) != 1:
            how = f"fits a weight of {tuple(shape)} in several ways" if fits else f"does not fit {tuple(shape)}"
            raise ValueError(f"{name} of shape {tuple(scale.shape)} {how}")
        ((block, places),) = fits.items()
        return scale.reshape(places), block


def scaled_checkpoint(folder: Path, stored: Collection[str]) -> Scaled | None:
    """Returns how a checkpoint's weights are scaled, or None where no file in its folder has a header.

    Raises:
        ValueError: the weights are more than scaled, or a file is damaged.
    """
    config = read_json(folder / "config.json") or {}
    header = header_of(config, read_json(folder / "hf_quant_config.json"))
    return None if header is None else Scaled(header, stored, dtype_of(config))


def read_json(path: Path) -> Any:
    """Returns what is in a file, or None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def warn_of_dropped(coded: CodedWeights) -> None:
    """Warns of what is lost when only the weights are kept."""
    notice = coded.notice()
    if notice is not None:
        warn(notice)


def refuse_narrow(dtypes: Dtypes) -> None:
    """Refuses a checkpoint without a header whose weights may be codes: nobody knows what they stand for.

    Args:
        dtypes: of the stored tensors that the model has as parameters.

    Raises:
        ValueError: one has 8 bits or fewer. The message names the first and has their number.
    """
    narrow = sorted(name for name, dtype in dtypes.items() if _is_narrow(dtype))
    if narrow:
        others = f" and {len(narrow) - 1:,} more are" if len(narrow) > 1 else " is"
        raise ValueError(
            f"{narrow[0]}{others} stored in 8 bits or fewer ({dtypes[narrow[0]]}), and neither config.json nor "
            "hf_quant_config.json says how they are scaled: add the quantization_config that they were written with, "
            "or compress the original"
        )


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None, block: Block) -> Tensor:
    """Returns w = (codes - zero_point) · scale, in float32.

    Args:
        codes: (..., out_features, in_features).
        scale: (..., ceil(out_features / rows), ceil(in_features / columns)), in float32.
        zero_point: likewise.
        block: its rows and columns.
    """
    weight = codes.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    rows, columns = block
    for column, part in enumerate(weight.split(columns, -1) if weight.dim() > 1 else [weight]):
        for tensor, operation in ((zero_point, part.sub_), (scale, part.mul_)):
            if tensor is not None:
                operation(_of_rows(tensor[..., column : column + 1], rows, codes))
    return weight


def _power_of_two(exponents: Tensor) -> Tensor:
    """Returns 2 to the power of (exponents - 127), exactly, by the bits of a float64."""
    return ((exponents.to(torch.int64) + (1023 - 127)) << 52).view(torch.float64)


def _of_rows(scale: Tensor, rows: int, codes: Tensor) -> Tensor:
    """Returns a scale of each row, where there is one of each block of rows; as it is where it is broadcast."""
    if scale.dim() < 2 or scale.shape[-2] == 1 or rows == 1:
        return scale
    return scale.repeat_interleave(rows, -2)[..., : codes.shape[-2], :]


def _scales(stored: Collection[str]) -> dict[str, str]:
    """Returns the name of each weight's scale.

    Raises:
        ValueError: a weight has two.
    """
    found: dict[str, str] = {}
    for end in SCALES:
        for name in sorted(name for name in stored if name.endswith(end)):
            weight = name.removesuffix(end)
            if weight not in stored:
                continue
            if weight in found:
                raise ValueError(f"{weight} has two scales, {found[weight]} and {name}")
            found[weight] = name
    return found


def _fits(scale: tuple[int, ...], shape: tuple[int, ...], blocks: Collection[Block]) -> dict[Block, tuple[int, ...]]:
    """Returns the blocks of a weight whose scales may have a shape, each with that shape in the weight's dimensions.

    A block is cut to the weight's size, so that two that mean the same are one.
    """
    if math.prod(scale) == 1:
        return {(max(shape[-2:-1], default=1), shape[-1] if shape else 1): (1,) * len(shape)}
    if len(shape) < 2:
        return {}
    out_features, in_features = shape[-2:]
    found = {}
    for rows, columns in ((out_features, in_features), (1, in_features), *blocks):
        places = (*shape[:-2], math.ceil(out_features / rows), math.ceil(in_features / columns))
        # (out_features,) is (out_features, 1), and ModelOpt stores blocks as (rows, 1, columns, 1).
        same = scale == places if len(scale) == len(places) else _long(scale) == _long(places)
        if same:
            found[min(rows, out_features), min(columns, in_features)] = places
    return found


def _long(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _is_narrow(dtype: Any) -> bool:
    if isinstance(dtype, str) and dtype in NARROW:
        return True
    known = getattr(torch, _torch_name(dtype), None)
    return isinstance(known, torch.dtype) and known.itemsize == 1 and known != torch.bool


def _torch_name(dtype: str | torch.dtype) -> str:
    return SAFETENSORS.get(str(dtype), str(dtype).removeprefix("torch."))
