"""Writes a compressed model as a checkpoint that transformers and servers load."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.blocks import block_layers, matrix
from opt8bit.ptq.export.compressed_tensors import CompressedTensors
from opt8bit.ptq.export.dense import Dense
from opt8bit.ptq.export.folder import new_folder
from opt8bit.ptq.export.gptq import GPTQFormat
from opt8bit.ptq.export.layout import Layout, Planned
from opt8bit.ptq.export.shards import write_shards
from opt8bit.ptq.layer import Recipe
from opt8bit.ptq.placement import config_with_places
from opt8bit.ptq.report import write_probe
from opt8bit.ptq.result import Result
from opt8bit.ptq.saved import as_saved, check_saved, saved_layer

FORMATS: dict[str, Layout] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQFormat(),
    "dense": Dense(),
}


def export(result: Result, path: str | Path, *, format: str = "compressed-tensors", tokenizer: Any = None) -> Path:
    """Writes a model that :func:`compress` made, to be loaded by ``from_pretrained``.

    Args:
        result: of :func:`compress`, of a model of transformers.
        path: the folder to make; it must not exist.
        format: "compressed-tensors" (pack-quantized) and "gptq" hold the codes; "dense" has the rounded weights in the
            model's own dtype and layout, for anything that loads the original.
        tokenizer: saved beside the weights, if given.

    Returns:
        The path.

    Raises:
        FileExistsError: there is something at ``path``.
        TypeError: the model is not one of transformers.
        ValueError: there is no such format, or it cannot hold a layer, which the message names.
        OSError: it cannot be written; nothing is left.
    """
    with new_folder(Path(path)) as folder:
        write(result, folder, format, tokenizer)
    return Path(path)


def write(result: Result, folder: Path, format: str, tokenizer: Any = None) -> None:
    """Writes the checkpoint's files into a folder, arguments as in :func:`export`."""
    check_format(format, result.model, result.recipe)
    layout = FORMATS[format]
    config = _config(result, layout)
    write_shards(_tensors(result, layout), folder)
    config.save_pretrained(folder)
    generation: Any = getattr(result.model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained, which refuses what from_pretrained takes, such as a temperature where nothing is sampled.
        generation = copy.copy(generation)
        generation.compile_config = None  # is of this machine
        generation.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder)
    for file in result.source.code():
        shutil.copy(file, folder)
    if result.probe is not None:
        write_probe(result.probe, folder)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """
    Raises:
        OSError: it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # where the disk is full tokenizers raises a plain one
        raise OSError(f"cannot write the tokenizer to {folder}: {error}") from error


def check_format(format: str, model: nn.Module, recipe: Recipe) -> None:
    """Whether a checkpoint's format can hold what a recipe makes of a model, before it is made.

    Raises:
        TypeError, ValueError: as :func:`export`.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"only models of transformers can be exported, got {type(model).__name__}")
    if recipe.statistic == "position":
        raise ValueError("no checkpoint can hold a bias for each position: use statistic='mean' or 'median'")
    _check_configurations(model)
    check_saved(model, packed=format != "dense")
    layers = block_layers(model)
    recipes = {name: recipe.of(name) for name in layers}
    planned = {name: Planned(layers[name], own.scheme, own.method) for name, own in recipes.items() if own is not None}
    FORMATS[format].check(planned, [name for name in layers if name not in planned])


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


def _config(result: Result, layout: Layout) -> Any:
    model: Any = result.model
    config = config_with_places(model, result.places.values())
    if type(config) is type(model.config):
        config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    quantization = layout.config(result)
    if quantization is not None:
        config.quantization_config = quantization
    return config


def _tensors(result: Result, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Everything that the checkpoint has, by its name there."""
    for name, tensor in _own_tensors(result, layout):
        owner, _, kind = name.rpartition(".")
        if owner in result.layers and kind not in ("weight", "bias"):  # a part of what a packed weight is
            yield f"{saved_layer(result.model, owner)}.{kind}", tensor
        else:
            yield from as_saved(result.model, {name: tensor}).items()


def _own_tensors(result: Result, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """The same by the model's names."""
    modules: dict[str, Any] = dict(result.model.named_modules())
    # Whoever loads the checkpoint makes a bias for every layer that a switch gives one: it must find them all.
    switched = {name for name, place in result.places.items() if place and place.kind in ("switch", "llama")}
    for name, tensor in result.source.tensors():
        owner, _, kind = name.rpartition(".")
        layer = result.layers[owner] if kind in ("weight", "bias") and owner in result.layers else None
        if layer is None:
            yield name, tensor
        elif kind == "weight":
            for suffix, part in layout.weight(layer, modules[owner]).items():
                yield f"{owner}.{suffix}", part
        if kind == "weight" and layer is not None and layer.bias is not None:
            yield f"{owner}.bias", layer.bias.to(layer.dtype)
        elif kind == "weight" and owner in switched:
            yield f"{owner}.bias", tensor.new_zeros(len(matrix(modules[owner])))
