"""The format of llama.cpp's files, which Ollama and LM Studio run, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned
from opt8bit.ptq.export.gguf import running
from opt8bit.ptq.export.gguf.metadata import add_metadata, check_metadata, frequency_divisors
from opt8bit.ptq.export.gguf.tokenizer import add_tokenizer, check_tokenizer
from opt8bit.ptq.export.huggingface import HuggingFaceFormat
from opt8bit.ptq.export.uniform import check_codes_only, scheme_of, stored_part
from opt8bit.ptq.model.bias_places import config_with_places
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.model.gguf.architectures import BIAS, WEIGHT, Architecture, architecture_of, as_neighbours
from opt8bit.ptq.model.gguf.blocks import GROUP, pack_blocks
from opt8bit.ptq.model.gguf.grids import type_of
from opt8bit.ptq.model.gguf.reading import BLOCKS, FILE, TYPE, opened, package, type_named, type_tensor
from opt8bit.ptq.model.gguf.superblocks import LAYOUTS, pack_superblocks
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.model.tensor_files import DTYPES, Header
from opt8bit.ptq.result import Result
from opt8bit.quant.uniform import UniformGrid, is_uniform
from opt8bit.quant.weight import QuantizedWeight, WeightScheme
from opt8bit.recipe.gguf_types import GGUF_TYPES

SYMMETRIC = (4, 5, 8)  # bits of Q4_0, Q5_0 and Q8_0, which need no name
ROPE_FACTORS = "rope_freqs.weight"


class GGUFFormat(HuggingFaceFormat):
    """A file beside the configuration and the tokenizer, which llama.cpp takes alone.

    Rounded weights are blocks of a type of ggml, which the recipe's grid names; symmetric grids of 4, 5 and 8 bits in
    groups of 32 are Q4_0, Q5_0 and Q8_0. Embeddings and head are Q8_0, where 32 divides their rows. Other matrices are
    stored in float16, vectors in float32.
    """

    parts = (BLOCKS, TYPE)
    keeps_others = False
    runtime = "llama.cpp"
    is_packed = True
    is_symmetric = True
    is_read_by_transformers = False
    outside = WeightScheme(UniformGrid(8, symmetric=True, scale_dtype=torch.float16), GROUP)
    scale_dtype = torch.float16
    decoded_in = torch.float16  # in which matrices are stored that are not rounded

    def check(self, model: nn.Module, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        package()
        config: Any = getattr(model, "config", None)
        architecture = architecture_of(config)
        check_metadata(architecture, config)
        for name, _ in model.named_parameters():
            _stored_name(architecture, name)
        for name, planned in layers.items():
            _check_layer(name, planned)

    def check_source(self, source: Source) -> None:
        for name, _ in source.model.named_parameters():
            stored = source.stored_name(name)
            if stored not in (None, name):
                raise ValueError(f"{name}: gguf is written of checkpoints with the model's own names, got {stored}")
        if source.files is not None:
            config: Any = source.model.config
            check_tokenizer(source.files.folder, config.vocab_size)

    def tensors(self, weight: QuantizedWeight, module: nn.Module) -> dict[str, Tensor]:
        (part,) = weight.parts
        kind = type_of(WeightScheme(part.grid, weight.shape[1] // part.params[0].shape[1]))
        assert kind is not None
        return {TYPE: type_tensor(kind), BLOCKS: _packed(kind, weight)}

    def quantization(self, result: Result) -> dict[str, Any]:
        return {"quant_method": "gguf"}

    def write_tensors(self, tensors: Iterator[tuple[str, Tensor]], result: Result, folder: Path) -> list[str]:
        gguf, config = package(), config_with_places(result.model, result.places.values())
        architecture = architecture_of(config)
        changed, kinds = [], {}
        with _written(folder / FILE, architecture) as writer:
            writer.add_quantized_by(f"opt8bit {version('opt8bit')}")
            writer.add_file_type(gguf.LlamaFileType[GGUF_TYPES[_usual_type(result)].file_type])
            add_metadata(writer, architecture, config)
            add_tokenizer(writer, folder, config.vocab_size)
            for name, tensor in tensors:
                if name in result.source.without_place:
                    continue
                owner, _, part = name.rpartition(".")
                if part == TYPE:
                    kinds[owner] = type_named(tensor)
                    continue
                array, kind = stored_tensor(architecture, config, name, tensor, kinds.get(owner))
                writer.add_tensor(_stored_name(architecture, name), array, raw_dtype=gguf.GGMLQuantizationType[kind])
                if kind != DTYPES[tensor.dtype]:
                    changed.append(name)
            factors = frequency_divisors(config)
            if factors is not None:
                writer.add_tensor(ROPE_FACTORS, factors.numpy())
        return changed

    def shape_and_bits(
        self, parts: Mapping[str, Header], read: Callable[[str], Tensor]
    ) -> tuple[tuple[int, int], int | None] | None:
        if BLOCKS not in parts:
            return None
        kind, (outputs, blocks, _) = GGUF_TYPES[type_named(read(TYPE))], parts[BLOCKS].shape
        return (outputs, blocks * kind.block), kind.bits

    def grid_of(self, parts: Mapping[str, Header], read: Callable[[str], Tensor]) -> str | None:
        return type_named(read(TYPE))

    def log_probabilities(self, folder: Path, token_ids: Tensor) -> Tensor | None:
        with opened(folder / FILE) as file:
            is_run = file.has_tokenizer and running.is_installed()
        return running.log_probabilities(folder / FILE, token_ids.tolist()) if is_run else None

    def load_options(self, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None


@contextmanager
def _written(file: Path, architecture: Architecture) -> Iterator[Any]:
    """Yields gguf's writer: what it has been given is in the file at the end. Until then tensors wait beside it."""
    writer = package().GGUFWriter(file, architecture.name, use_temp_file=True)
    with TemporaryFile(dir=file.parent) as waiting:
        writer.temp_file = waiting  # or it would make one where temporary files are, which may be the memory
        try:
            yield writer
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def stored_tensor(
    architecture: Architecture, config: Any, name: str, tensor: Tensor, kind: str | None = None
) -> tuple[np.ndarray[Any, Any], str]:
    """Returns a tensor as a GGUF file has it, and ggml's name of its type.

    Args:
        architecture: of the model.
        config: of the model.
        name: of the tensor in the model, or that of its blocks.
        tensor: as the model has it, or blocks.
        kind: ggml's name of the type of blocks.

    Raises:
        ValueError: float16 does not hold it, or llama.cpp has no place for it.
    """
    stored = _stored_name(architecture, name)
    heads = architecture.heads(stored, config.num_attention_heads, config.num_key_value_heads)
    if heads is not None:
        tensor = as_neighbours(tensor, heads)
    if kind is not None and name.endswith(f".{BLOCKS}"):
        return tensor.flatten(1).numpy(), kind
    if tensor.dim() == 1:
        return (tensor.float() + architecture.offset(stored)).numpy(), "F32"
    found = tensor.to(torch.float16)
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} has values that float16 does not hold")
    return found.numpy(), "F16"


def _stored_name(architecture: Architecture, name: str) -> str:
    """Returns the name in the file of a tensor of the model, or of its blocks.

    Raises:
        ValueError: llama.cpp has no place for it.
    """
    owner, _, kind = name.rpartition(".")
    found = architecture.stored_name(f"{owner}.{WEIGHT}" if kind == BLOCKS else name)
    if found is None:
        hint = ": compress for it, with runtime='llama.cpp'" if kind == BIAS else ""
        raise ValueError(f"{name}: llama.cpp's {architecture.name} has no place for it{hint}")
    return found


def _check_layer(name: str, planned: Planned) -> None:
    """
    Raises:
        ValueError: no type of blocks holds the layer.
    """
    check_codes_only("gguf", name, planned)
    kind = type_of(planned.scheme)
    if kind is None:
        _refuse(name, planned.scheme)
    inputs, block = matrix(planned.module).shape[1], GGUF_TYPES[kind].block
    if inputs % block:
        raise ValueError(
            f"{name}: {kind} takes rows of a multiple of {block} weights, got {inputs}: leave the layer as it is, by "
            "an override"
        )


def _refuse(name: str, scheme: WeightScheme) -> NoReturn:
    """
    Raises:
        ValueError: always, with what no type of blocks has of a scheme.
    """
    grid, use = scheme.grid, f"or grid as one of {', '.join(GGUF_TYPES)}"
    if not is_uniform(grid):
        raise ValueError(f"{name}: gguf holds the grids of ggml's types, got {grid!r}: give {use.removeprefix('or ')}")
    if grid.bits not in SYMMETRIC or not grid.symmetric:
        kind, allowed = "symmetric" if grid.symmetric else "asymmetric", ", ".join(map(str, SYMMETRIC))
        raise ValueError(f"{name}: gguf holds symmetric grids of {allowed} bits, got {grid.bits} bits, {kind}: {use}")
    if scheme.group_size != GROUP:
        raise ValueError(f"{name}: gguf has groups of {GROUP} weights, got {scheme.group_size}: {use}")
    raise ValueError(f"{name}: gguf holds scales of {torch.float16}, got {grid.scale_dtype}")


def _packed(kind: str, weight: QuantizedWeight) -> Tensor:
    """Returns the blocks of a weight on the grid of a type."""
    (part,) = weight.parts
    if kind in LAYOUTS:
        return pack_superblocks(kind, part.codes, part.params)
    if is_uniform(part.grid):
        part, _ = stored_part(weight)
        return pack_blocks(kind, part.codes, [part.params.scale])
    return pack_blocks(kind, part.codes, part.params)


def _usual_type(result: Result) -> str:
    """Returns ggml's name of the type that most layers have."""
    kinds = Counter(type_of(scheme_of(result, each.name)) for each in result.report)
    return kinds.most_common(1)[0][0] or ""


FORMAT = GGUFFormat()
