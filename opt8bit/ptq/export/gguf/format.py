"""The format of llama.cpp's files, which Ollama and LM Studio run, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned
from opt8bit.ptq.export.gguf import running
from opt8bit.ptq.export.gguf.metadata import add_metadata, check_metadata, frequency_divisors
from opt8bit.ptq.export.gguf.tokenizer import add_tokenizer, check_tokenizer
from opt8bit.ptq.export.huggingface import HuggingFaceFormat
from opt8bit.ptq.export.uniform import check_uniform, kind_of, scheme_of, stored_part, uniform_grid
from opt8bit.ptq.model.bias_places import config_with_places
from opt8bit.ptq.model.gguf.architectures import BIAS, WEIGHT, Architecture, architecture_of, as_neighbours
from opt8bit.ptq.model.gguf.blocks import GROUP, TYPES, bits_of, pack_blocks, unpack_blocks
from opt8bit.ptq.model.gguf.reading import BLOCKS, FILE, opened, package
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.model.tensor_files import DTYPES, Header
from opt8bit.ptq.result import Result
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import QuantizedWeight, WeightScheme

ROPE_FACTORS = "rope_freqs.weight"


class GGUFFormat(HuggingFaceFormat):
    """A file beside the configuration and the tokenizer, which llama.cpp takes alone.

    Rounded weights are blocks of 32: Q4_0, Q5_0 and Q8_0, by their bits. Embeddings and head are Q8_0, where 32 divides
    their rows. Other matrices are stored in float16, vectors in float32.
    """

    parts = (BLOCKS,)
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
        part, grid = stored_part(weight)
        return {BLOCKS: pack_blocks(part.codes, part.params.scale, grid.bits)}

    def quantization(self, result: Result) -> dict[str, Any]:
        return {"quant_method": "gguf"}

    def write_tensors(self, tensors: Iterator[tuple[str, Tensor]], result: Result, folder: Path) -> list[str]:
        gguf, config = package(), config_with_places(result.model, result.places.values())
        architecture = architecture_of(config)
        changed = []
        with _written(folder / FILE, architecture) as writer:
            writer.add_quantized_by(f"opt8bit {version('opt8bit')}")
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{_usual_type(result)}"])
            add_metadata(writer, architecture, config)
            add_tokenizer(writer, folder, config.vocab_size)
            for name, tensor in tensors:
                if name in result.source.without_place:
                    continue
                array, kind = stored_tensor(architecture, config, name, tensor)
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
        outputs, groups, _ = parts[BLOCKS].shape
        return (outputs, groups * GROUP), bits_of(parts[BLOCKS].shape)

    def grid_of(self, parts: Mapping[str, Header], read: Callable[[str], Tensor]) -> str | None:
        return kind_of(unpack_blocks(read(BLOCKS))[1], symmetric=True)

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
    architecture: Architecture, config: Any, name: str, tensor: Tensor
) -> tuple[np.ndarray[Any, Any], str]:
    """Returns a tensor as a GGUF file has it, and ggml's name of its type.

    Args:
        architecture: of the model.
        config: of the model.
        name: of the tensor in the model, or that of its blocks.
        tensor: as the model has it, or blocks.

    Raises:
        ValueError: float16 does not hold it, or llama.cpp has no place for it.
    """
    stored = _stored_name(architecture, name)
    heads = architecture.heads(stored, config.num_attention_heads, config.num_key_value_heads)
    if heads is not None:
        tensor = as_neighbours(tensor, heads)
    if name.endswith(f".{BLOCKS}"):
        return tensor.flatten(1).numpy(), TYPES[bits_of(tuple(tensor.shape))]
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
    grid = check_uniform("gguf", name, planned, torch.float16)
    if grid.bits not in TYPES or not grid.symmetric:
        kind = "symmetric" if grid.symmetric else "asymmetric"
        allowed = ", ".join(map(str, TYPES))
        raise ValueError(f"{name}: gguf holds symmetric grids of {allowed} bits, got {grid.bits} bits, {kind}")
    if planned.scheme.group_size != GROUP:
        raise ValueError(f"{name}: gguf has groups of {GROUP} weights, got {planned.scheme.group_size}")


def _usual_type(result: Result) -> str:
    """Returns ggml's name of the type that most layers have."""
    bits = Counter(uniform_grid(scheme_of(result, each.name)).bits for each in result.report)
    return TYPES[bits.most_common(1)[0][0]]


FORMAT = GGUFFormat()
