"""Reads the header of a quantized checkpoint: how its weights are scaled, or that they are more than scaled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

Header = Mapping[str, Any]
Block = tuple[int, int]  # rows and columns that share a scale

KEYS = ("quantization_config", "compression_config")
FLOAT8 = frozenset({"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})
INT8 = frozenset({"int8"})
CODES = {"float": FLOAT8, "int": INT8}  # by the type that compressed-tensors names
FORMATS = ("float-quantized", "int-quantized", "naive-quantized")  # of compressed-tensors, one code in each element
# Of ModelOpt; "NONE" where only keys and values are quantized.
MODELOPT: Mapping[str, tuple[Block, ...]] = {
    "FP8": (),
    "FP8_PER_CHANNEL_PER_TOKEN": (),
    "FP8_PB_WO": ((128, 128),),
    "NONE": (),
}


class Scheme(NamedTuple):
    """Says how the weights of a checkpoint are scaled: per tensor or per row, or per block where blocks are named.

    Attributes:
        codes: names of the dtypes that codes may have.
        blocks: of elements that share a scale, other than tensors and rows.
        exponents: whether scales in uint8 are exponents of two.
        activations: whether a server would quantize the inputs of layers, too.
        cache: whether a server would quantize keys and values.
    """

    codes: frozenset[str]
    blocks: tuple[Block, ...] = ()
    exponents: bool = False
    activations: bool = True
    cache: bool = False


def header_of(config: Header, hf_quant_config: Header | None = None) -> Header | None:
    """Returns what says how a checkpoint is quantized, or None.

    Args:
        config: of ``config.json``. The header may be that of the language model in one of several parts.
        hf_quant_config: of the file ``hf_quant_config.json`` that NVIDIA's ModelOpt writes, if there is one.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    found = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    return found if found is not None else hf_quant_config


def without_header(config: Header) -> dict[str, Any]:
    """Returns the configuration of the original: the same without its header, in all parts."""
    kept = ((key, value) for key, value in config.items() if key not in KEYS)
    return {key: without_header(value) if isinstance(value, Mapping) else value for key, value in kept}


def dtype_of(config: Header) -> torch.dtype:
    """Returns the dtype that a configuration names for the weights, or bfloat16 where it names none of 16 bits up."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    names = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    for name in names:
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.bfloat16


def scheme_of(header: Header) -> Scheme:
    """Reads a header.

    Raises:
        ValueError: it is of a quantization that is more than codes times scales, or of fewer than 8 bits.
    """
    inner = header.get("quantization_config") or header.get("quantization")  # of transformers, and of ModelOpt's file
    header = {**header, **inner} if isinstance(inner, Mapping) else header
    method = method_of(header)
    if method not in METHODS:
        raise _refused(method)
    return METHODS[method](header)


def method_of(header: Header) -> str:
    """Returns the name of what has quantized a checkpoint."""
    method = header.get("quant_method")
    if method is None and "quant_algo" in header:  # ModelOpt's own file has no method
        return "modelopt"
    if method is None and "config_groups" in header:  # nor have compressed-tensors' older headers
        return "compressed-tensors"
    return str(getattr(method, "value", method))  # transformers' configurations have a member of its enumeration


def _refused(by: str) -> ValueError:
    return ValueError(f"the model is quantized already, by {by}: compress the original")


def _caches(header: Header) -> bool:
    return bool(header.get("kv_cache_scheme") or header.get("kv_cache_quant_algo"))


def _fp8(header: Header) -> Scheme:
    """Reads transformers' FineGrainedFP8Config, as DeepSeek-V3 has it, and AutoFP8's where there are no blocks."""
    if header.get("expert_dtype") == "fp4":
        raise _refused("fp8 with experts in fp4")
    size = header.get("weight_block_size")
    blocks = () if size is None else (_block(size),)
    return Scheme(FLOAT8, blocks, exponents=header.get("scale_fmt") == "ue8m0", cache=_caches(header))


def _fbgemm_fp8(header: Header) -> Scheme:
    return Scheme(FLOAT8, cache=_caches(header))


def _modelopt(header: Header) -> Scheme:
    algorithm = str(header.get("quant_algo")).upper()
    if algorithm not in MODELOPT:
        raise _refused(f"modelopt ({algorithm})")
    return Scheme(
        FLOAT8, MODELOPT[algorithm], activations=algorithm not in ("FP8_PB_WO", "NONE"), cache=_caches(header)
    )


def _compressed_tensors(header: Header) -> Scheme:
    refuse_transforms(header)
    codes: frozenset[str] = frozenset()
    blocks, activations = [], False
    for group, layout in weight_groups(header):
        weights = group["weights"]
        if layout not in FORMATS or weights.get("num_bits", 8) != 8 or weights.get("type", "int") not in CODES:
            raise _refused(f"compressed-tensors ({layout}, {weights.get('num_bits', 8)} bits)")
        codes |= CODES[weights.get("type", "int")]
        activations |= bool(group.get("input_activations"))
        if weights.get("strategy") == "block" or weights.get("block_structure"):
            blocks.append(_block(weights.get("block_structure")))
        elif (weights.get("group_size") or -1) > 0:
            blocks.append((1, weights["group_size"]))
    return Scheme(codes, tuple(blocks), activations=activations, cache=_caches(header))


def weight_groups(header: Header) -> Iterator[tuple[Header, str]]:
    """Yields a configuration's groups that have quantized weights, each with the format in which they are stored."""
    for name, group in (header.get("config_groups") or {}).items():
        if not isinstance(group, Mapping):
            raise _refused(f"compressed-tensors, and its header does not say how {name} is stored")
        if group.get("weights"):
            yield group, str(group.get("format") or header.get("format"))


def refuse_transforms(header: Header) -> None:
    """
    Raises:
        ValueError: weights are sparse, or multiplied by matrices that the model must undo.
    """
    sparse = (header.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise _refused(f"compressed-tensors ({sparse})")
    if (header.get("transform_config") or {}).get("config_groups"):
        raise _refused("compressed-tensors with transforms")


def _quark(header: Header) -> Scheme:
    """Reads the header of AMD's Quark, where every weight is fp8 with one scale, or one for each row."""
    others = (header.get("layer_quant_config") or {}, header.get("layer_type_quant_config") or {})
    layers = [header.get("global_quant_config") or {}, *(layer for some in others for layer in some.values())]
    for weights in (layer.get("weight") for layer in layers):
        plain = isinstance(weights, Mapping) and str(weights.get("dtype")).startswith("fp8_")
        if weights and not (plain and weights.get("qscheme") in ("per_tensor", "per_channel")):
            raise _refused("quark, with weights that are not fp8 per tensor or per channel")
    if "rotation" in str(header.get("algo_config")).lower() or "quarot" in str(header.get("algo_config")).lower():
        raise _refused("quark with rotations")
    cache = bool((header.get("export") or {}).get("kv_cache_group"))
    return Scheme(FLOAT8, activations=any(layer.get("input_tensors") for layer in layers), cache=cache)


def _block(size: Any) -> Block:
    """Returns the sizes of a block, given as [128, 128] or as "128x128".

    Raises:
        ValueError: it is neither.
    """
    parts = size.split("x") if isinstance(size, str) else size
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(str(part).isdigit() for part in parts):
        raise ValueError(f"the header has blocks of {size!r}: two sizes were expected")
    rows, columns = (int(part) for part in parts)
    if not rows or not columns:
        raise ValueError(f"the header has blocks of {size!r}: sizes must be positive")
    return rows, columns


METHODS: Mapping[str, Callable[[Header], Scheme]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "quark": _quark,
}
