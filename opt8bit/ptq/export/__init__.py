"""Writes a compressed model as a checkpoint that transformers and servers load."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from opt8bit.backends import warn
from opt8bit.ptq.export.card.card import About, write_card
from opt8bit.ptq.export.checkpoint_format import CheckpointFormat, Planned
from opt8bit.ptq.export.float4 import NAMES, is_float4
from opt8bit.ptq.export.folder import new_folder
from opt8bit.ptq.model.blocks import block_layers, find_blocks, matrix, other_matrices
from opt8bit.ptq.model.servers import Layer, Packing, warnings_of
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.plan import Plan
from opt8bit.ptq.result import Result
from opt8bit.quant.packing import WORD
from opt8bit.quant.uniform import is_uniform
from opt8bit.recipe.registry import FORMATS
from opt8bit.recipe.runtimes import DENSE, RUNTIMES, SERVERS, Runtime, check_reads, packed_format, runtime_of

logger = logging.getLogger(__name__)


def export(result: Result, path: str | Path, *, format: str | None = None, tokenizer: Any = None) -> Path:
    """Writes a model that :func:`compress` made, to be loaded by ``from_pretrained``, by mlx-lm or by llama.cpp.

    A model card, ``README.md``, lies beside the weights. That of the source is kept as ``BASE_README.md``.

    Args:
        result: of :func:`compress`, of a model of transformers.
        path: the folder to make; it must not exist.
        format: "compressed-tensors" (pack-quantized), "gptq", "mlx" and "gguf" hold the codes; "dense" has the rounded
            weights in the model's own dtype and layout, for anything that loads the original. Codes are packed as the
            ``runtime`` that :func:`compress` was given reads them; by default in the format that it reads, and in
            "compressed-tensors" for none in particular.
        tokenizer: saved beside the weights, if given, and for "gguf" in their file.

    Returns:
        The path.

    Raises:
        FileExistsError: there is something at ``path``.
        TypeError: the model is not one of transformers.
        ValueError: there is no such format, or it cannot hold a layer, which the message names, or the runtime does not
            run it.
        OSError: it cannot be written; nothing is left.
    """
    format = format or packed_format(result.plan.runtime)
    with new_folder(Path(path)) as folder:
        write(result, folder, format, tokenizer)
        write_model_card(result, folder, format, About(Path(path).absolute().name))
    return Path(path)


def write(result: Result, folder: Path, format: str, tokenizer: Any = None) -> None:
    """Writes the checkpoint's files into a folder, arguments as in :func:`export`."""
    check_format(format, result.source, result.plan)
    logger.info("writing the checkpoint in the format %s", format)
    FORMATS[format].for_runtime(runtime_of(result.plan.runtime)).write(result, folder, tokenizer)


def write_model_card(result: Result, folder: Path, format: str, about: About) -> None:
    """Writes the model card of a checkpoint that :func:`write` has written there.

    Raises:
        OSError: it cannot be written.
    """
    runtimes = {name: runtime for name, runtime in RUNTIMES.items() if _runs(result, format, runtime)}
    write_card(result, folder, format, runtimes, about)


def _runs(result: Result, format: str, runtime: Runtime) -> bool:
    """Tells whether a runtime runs a checkpoint that was written."""
    if format == DENSE:
        return runtime.reads_dense
    if format not in runtime.formats:
        return False
    own = runtime_of(result.plan.runtime)
    if FORMATS[format].for_runtime(own) != FORMATS[format].for_runtime(runtime) and _is_packed_by_version(result):
        return False
    planned, _ = _planned(result.source, result.plan)
    return not _not_run(format, result.source, planned, [runtime])


def _is_packed_by_version(result: Result) -> bool:
    """Tells whether 32 is no multiple of the bits of some code, which runtimes pack in different ways."""
    packings = [_packing(planned) for planned in _planned(result.source, result.plan)[0].values()]
    return any(packing is not None and WORD % packing.bits for packing in packings)


def check_format(format: str, source: Source, plan: Plan) -> None:
    """Checks that a format can hold what a plan makes of a model, and its runtime run it, before it is made.

    Raises:
        TypeError, ValueError: as :func:`export`.
    """
    FORMATS.check(format)
    check_reads(plan.runtime, format)
    if plan.statistic == "position":
        raise ValueError("no checkpoint can hold a bias for each position: use statistic='mean' or 'median'")
    planned, left = _planned(source, plan)
    source.check_stored(planned, packed=FORMATS[format].is_packed)
    if source.files is None:
        _check_configurations(source.model)
    FORMATS[format].check(source.model, planned, left)
    FORMATS[format].check_source(source)
    runtime = runtime_of(plan.runtime)
    refused = [] if runtime is None else _not_run(format, source, planned, [runtime])
    if refused:
        raise ValueError("\n  ".join([f"runtime {plan.runtime!r} does not run what would be written:", *refused]))


def warn_of_servers(format: str, source: Source, plan: Plan) -> None:
    """Warns of what servers will refuse, or get wrong, of what is to be written for no runtime in particular.

    Args:
        format, source, plan: that :func:`check_format` has let through.

    Warns:
        UserWarning: there is something, or the packages that are installed do not load it. It says what to do.
    """
    planned, _ = _planned(source, plan)
    found = _not_run(format, source, planned, SERVERS)
    found += [f"{line}: verify will unpack them itself" for line in FORMATS[format].not_loaded_here(planned)]
    if found:
        warn("\n  ".join(["not every server runs what will be written:", *found]))


def _not_run(format: str, source: Source, planned: Mapping[str, Planned], runtimes: Sequence[Runtime]) -> list[str]:
    """Returns, in sentences, what runtimes refuse, or get wrong, of what is to be written."""
    layers = block_layers(source.model)
    stored = {name: Layer(_shape(layer), _packing(planned.get(name))) for name, layer in layers.items()}
    has_experts = any(".experts." in name for name in layers)
    has_experts = has_experts or any(param.dim() > 2 for param in other_matrices(source.model).values())
    prefix, blocks = find_blocks(source.model)
    return warnings_of(format, stored, prefix, len(blocks), has_experts=has_experts, runtimes=runtimes)


def _shape(layer: nn.Module) -> tuple[int, int]:
    outputs, inputs = matrix(layer).shape
    return outputs, inputs


def _packing(planned: Planned | None) -> Packing | None:
    if planned is None:
        return None
    grid = planned.scheme.grid
    if is_float4(grid):
        return Packing(grid.bits, True, planned.scheme.group_size, NAMES[type(grid)])
    if not is_uniform(grid):
        return None
    return Packing(grid.bits, bool(grid.symmetric), planned.scheme.group_size)


def _planned(source: Source, plan: Plan) -> tuple[dict[str, Planned], list[str]]:
    """Returns the layers that will be rounded, and the names of those that stay as they are."""
    layers = block_layers(source.model)
    plans = {name: plan.of(name) for name in layers}
    planned = {name: Planned(layers[name], own.scheme, own.method) for name, own in plans.items() if own is not None}
    return planned, [name for name in layers if name not in planned]


def format_of(config: Mapping[str, Any]) -> CheckpointFormat | None:
    """Returns the format of a checkpoint with this configuration, or None if it is none of :data:`FORMATS`.

    Raises:
        KeyError, TypeError: it is no configuration.
    """
    quantization = config.get("quantization_config")
    return FORMATS.get("dense" if quantization is None else quantization["quant_method"])


def _check_configurations(model: Any) -> None:
    """
    Raises:
        ValueError: transformers would not write the model's configuration, or not read that of its generation again.
    """
    with TemporaryDirectory() as folder:
        copy.deepcopy(model.config).save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.validate()
