"""The format ``pack-quantized`` of compressed-tensors, which vLLM, SGLang and transformers load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned, StoredCodes
from opt8bit.ptq.export.float4 import (
    GLOBAL_SCALE,
    check_float4,
    float4_format,
    float4_name,
    float4_scheme,
    float4_shape,
    float4_tensors,
    is_float4,
)
from opt8bit.ptq.export.huggingface import HuggingFaceFormat
from opt8bit.ptq.export.initialization import asks_for_weights, check_initialization, needs_weights
from opt8bit.ptq.export.installed import Codes, not_loaded_here
from opt8bit.ptq.export.uniform import check_uniform, kind_of, scheme_of, stored_part, uniform_grid
from opt8bit.ptq.model.blocks import find_blocks, matrix, other_matrices
from opt8bit.ptq.model.packed.compressed_tensors import FORMAT as FORMAT_NAME
from opt8bit.ptq.model.packed.compressed_tensors import CompressedTensorsLayout, bits_of, has_whole_codes
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.ptq.result import Result
from opt8bit.quant.grid import Grid
from opt8bit.quant.packing import WORD, pack
from opt8bit.quant.uniform import is_uniform
from opt8bit.quant.weight import QuantizedWeight, WeightScheme
from opt8bit.recipe.runtimes import Runtime


@dataclass(frozen=True)
class CompressedTensors(HuggingFaceFormat):
    """Integers of 2 to 8 bits, symmetric or not, by group or by row.

    ``weight_packed``, int32 (out, words of in codes), has the codes; ``weight_scale`` (out, groups) is of the model's
    dtype, negative where a symmetric grid is mirrored; ``weight_zero_point``, int32 (words of out codes, groups), is
    there where the grid is not symmetric; ``weight_shape`` is (out, in). A weight is
    ``(code - zero_point) * weight_scale``. All layers may be on one grid of 4-bit floats instead; see
    :func:`float4_tensors`.

    Attributes:
        whole_codes: whether words hold whole codes only, as the package packed them before version 0.18; see
            :func:`opt8bit.quant.packing.pack`.
    """

    whole_codes: bool = False

    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", GLOBAL_SCALE)
    is_packed = True

    def for_runtime(self, runtime: Runtime | None) -> CompressedTensors:
        return CompressedTensors(whole_codes=runtime is not None and runtime.whole_codes)

    def check(self, model: nn.Module, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        if any(is_float4(planned.scheme.grid) for planned in layers.values()):
            _check_all_float4(layers)
            check_initialization(model, layers)
            return
        grids = {name: check_uniform("compressed-tensors", name, planned) for name, planned in layers.items()}
        schemes = {repr(sorted(_scheme(planned.scheme).items(), key=str)) for planned in layers.values()}
        if len(schemes) > 1 and _brought_back({planned.module for planned in layers.values()}, grids.values()):
            raise ValueError(
                "transformers loads compressed-tensors of several widths or group sizes where all grids are symmetric "
                "and all layers nn.Linear themselves: use symmetric grids, or format 'dense'"
            )
        check_initialization(model, layers)

    def not_loaded_here(self, layers: Mapping[str, Planned]) -> list[str]:
        grids = [planned.scheme.grid for planned in layers.values() if is_uniform(planned.scheme.grid)]
        return not_loaded_here(Codes(grid.bits, bool(grid.symmetric), self.whole_codes) for grid in grids)

    def tensors(self, weight: QuantizedWeight, module: nn.Module) -> dict[str, Tensor]:
        if is_float4(weight.grids[0]):
            return float4_tensors(weight)
        part, grid = stored_part(weight)
        tensors = {
            "weight_packed": self._pack(part.codes, grid.bits),
            "weight_scale": part.params.scale.to(matrix(module).dtype),
            "weight_shape": torch.tensor(part.codes.shape, device="cpu"),
        }
        if not grid.symmetric:
            tensors["weight_zero_point"] = self._pack(part.params.zero_point.T.to(torch.int64), grid.bits).T
        return tensors

    def _pack(self, codes: Tensor, bits: int) -> Tensor:
        return pack(codes, bits, whole_codes=self.whole_codes)

    def quantization(self, result: Result) -> dict[str, Any]:
        modules = dict(result.model.named_modules())
        schemes: list[dict[str, Any]] = []
        targets: list[list[str]] = []  # names, by scheme
        compressed = {row.name for row in result.report}
        for name in sorted(compressed):
            scheme = _scheme(scheme_of(result, name))
            if scheme not in schemes:
                schemes.append(scheme)
                targets.append([])
            targets[schemes.index(scheme)] += _names(result, name)
        classes = sorted({type(modules[name]).__name__ for name in compressed} | {"Linear"})
        if len(schemes) == 1:
            targets = [classes]
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        grids = [scheme_of(result, name).grid for name in compressed]
        packed = float4_format(grids[0]) if is_float4(grids[0]) else FORMAT_NAME
        brought_back = _brought_back((modules[name] for name in compressed), grids)
        return {
            "quant_method": "compressed-tensors",
            "format": packed,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {
                    "targets": target,
                    "weights": scheme,
                    "input_activations": None,
                    "output_activations": None,
                    "format": packed,
                }
                for i, (scheme, target) in enumerate(zip(schemes, targets, strict=True))
            },
            "ignore": _ignored(result, [name for name in linear if name not in compressed]),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({"dequantize": True} if brought_back or needs_weights(result.model, compressed) else {}),
            # The same in the words of transformers 4, which can run more without it than version 5 can load.
            **({"run_compressed": False} if asks_for_weights(result.model, compressed) else {}),
        }

    def shape_and_bits(
        self, parts: Mapping[str, Header], read: Callable[[str], Tensor]
    ) -> tuple[tuple[int, int], int | None] | None:
        if "weight_packed" not in parts:
            return None
        of_floats = float4_shape(parts)
        if of_floats is not None:
            return of_floats, 4
        if "weight_shape" not in parts:
            raise ValueError("weight_packed, but no weight_shape")
        rows, columns = read("weight_shape").tolist()
        return (rows, columns), WORD * parts["weight_packed"].shape[1] // columns

    def codes_of(self, layer: str, columns: int, parts: Mapping[str, Header], header: Any) -> StoredCodes | None:
        try:
            bits = bits_of(CompressedTensorsLayout.of(header).weights_of(layer))
        except ValueError:  # another program's, which the header does not name
            return None
        return StoredCodes(bits, has_whole_codes(parts["weight_packed"].shape[1], bits, columns))

    def grid_of(self, parts: Mapping[str, Header], read: Callable[[str], Tensor]) -> str | None:
        if "weight_packed" in parts and float4_shape(parts) is not None:
            return float4_name(parts)
        return kind_of(read("weight_scale"), "weight_zero_point" not in parts) if "weight_scale" in parts else None

    def load_options(self, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if quantization is None or len(quantization["config_groups"]) > 1:
            return None
        return {"quantization_config": {**quantization, "dequantize": True}}


def _ignored(result: Result, left: Iterable[str]) -> list[str]:
    """Returns the names of what servers must not look for packed weights in.

    Linear layers that stay as they are; experts that are one tensor, under any names that a server gives each of them;
    whole towers beside the blocks, whose insides versions of transformers name otherwise; and what the model has no
    place for.
    """
    of_packed = {part for row in result.report for part in row.name.split(".")}
    layers: list[str] = []
    towers: list[str] = []
    for name in left:
        tower = _tower(result.model, name)
        if tower is None or tower in of_packed:
            layers += _names(result, name)
        elif tower not in towers:
            towers.append(tower)
    params = [name for name, param in other_matrices(result.model).items() if param.dim() > 2]
    experts = [experts_of(name.rpartition(".")[0]) for name in params]
    compressed = [row.name for row in result.report]
    prefix, _ = find_blocks(result.model)
    of_experts = [
        # Servers have other names for what the blocks are in, and do not map regular expressions to them.
        f"re:(.*\\.)?{re.escape(name.removeprefix(prefix.rpartition('.')[0]).removeprefix('.'))}(\\..*)?$"
        for name in sorted({each for names in experts for each in names})
        if not any(other.startswith(f"{name}.") for other in compressed)
    ]
    of_towers = [f"re:^(.*\\.)?{re.escape(tower)}\\..*$" for tower in towers]
    others = [name.removesuffix(".weight") for name in sorted(result.source.without_place) if name.endswith(".weight")]
    return [*layers, *of_experts, *of_towers, *others]


def _tower(model: nn.Module, name: str) -> str | None:
    """Returns the own name of the largest module around a layer that has no blocks in it, or None if there is none."""
    blocks, parts = find_blocks(model)[0].split("."), name.split(".")
    shared = 0
    while shared < len(blocks) and parts[shared] == blocks[shared]:
        shared += 1
    return None if shared in (len(blocks), len(parts) - 1) else parts[shared]


def experts_of(module: str) -> list[str]:
    """Returns the names under which servers have the experts that a module holds as one tensor.

    Most call the list ``experts``. Where the model has no such name, the experts are in its own module here, and beside
    it in servers: Granite's ``block_sparse_moe.input_linear`` is ``block_sparse_moe.experts`` there.
    """
    parts = module.split(".")
    if "experts" in parts:
        return [".".join(parts[: parts.index("experts") + 1])]
    return [module, ".".join([*parts[:-1], "experts"])]


def _names(result: Result, name: str) -> list[str]:
    """Returns a layer's names in the model and in the checkpoint; programs differ in which of them they read."""
    stored = result.source.stored_name(f"{name}.weight")
    return [name] if stored is None else list(dict.fromkeys([name, stored.removesuffix(".weight")]))


def _brought_back(modules: Iterable[nn.Module], grids: Iterable[Grid]) -> bool:
    """Tells whether transformers must dequantize on loading: it runs only nn.Linear and symmetric integers.

    4-bit floats it runs in bfloat16, whatever the model's dtype is.
    """
    integers = all(is_uniform(grid) and grid.symmetric for grid in grids)
    return not integers or not all(type(module) is nn.Linear for module in modules)


def _check_all_float4(layers: Mapping[str, Planned]) -> None:
    """
    Raises:
        ValueError: not all layers are on one grid of 4-bit floats, or one cannot be held.
    """
    grids = {name: planned.scheme.grid for name, planned in layers.items()}
    first = next(iter(grids.values()))
    for name, planned in layers.items():
        if type(grids[name]) is not type(first):
            raise ValueError(
                f"{name}: compressed-tensors is written with one grid of 4-bit floats for all layers, got "
                f"{grids[name]!r} and {first!r}: use one of both, leave layers as they are, or use format 'dense'"
            )
        check_float4(name, planned)


def _scheme(scheme: WeightScheme) -> dict[str, Any]:
    if is_float4(scheme.grid):
        return float4_scheme(scheme.grid)
    grid = uniform_grid(scheme)
    by_group = {"strategy": "group", "group_size": scheme.group_size}
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": bool(grid.symmetric),
        "dynamic": False,
        "actorder": None,
        **(by_group if scheme.group_size else {"strategy": "channel", "group_size": None}),
    }


FORMAT = CompressedTensors()
