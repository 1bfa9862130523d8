"""``compress``: the front door. Everything is checked here, before hours are spent."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.backends import first_of, warn
from opt8bit.ptq import ranks
from opt8bit.ptq.arguments import check_count
from opt8bit.ptq.blocks import block_layers, find_blocks, linear_layers, matrix, other_matrices
from opt8bit.ptq.evaluate import check_token_ids
from opt8bit.ptq.export import check_format, warn_of_servers
from opt8bit.ptq.layer import Recipe
from opt8bit.ptq.memory import warn_of_memory
from opt8bit.ptq.methods import GPTQ, Method, QuantEase
from opt8bit.ptq.methods.method import check_method
from opt8bit.ptq.options import recipe_for
from opt8bit.ptq.origin import refuse_quantized, unwrapped
from opt8bit.ptq.pipeline import run
from opt8bit.ptq.result import LayerReport, Result
from opt8bit.ptq.source import InMemory, Loaded, Source, digest
from opt8bit.ptq.walk import greenlets
from opt8bit.ptq.work import LAYOUT, Work
from opt8bit.quant.grid import Grid

Calibration = Tensor | Iterable[Mapping[str, Tensor]]
ERROR_PROPAGATION = 0.5
NAMED = 3  # of the weights that a warning is about


def polished(start: Method) -> QuantEase:
    """A method with the polish that the default recipe has: a little descent, and the scales refitted, in turn."""
    return QuantEase(sweeps=5, start=start, refits=3)


DEFAULT_METHOD = polished(GPTQ())


def compress(
    model: nn.Module | Source,
    calibration: Calibration,
    *,
    method: Method = DEFAULT_METHOD,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    range: str | None = None,
    grid: Grid | None = None,
    correct: str = "none",
    statistic: str = "mean",
    error_propagation: float | None = None,
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
    held_out: Calibration | None = None,
    batch_size: int = 8,
    work: str | Path | None = None,
    checkpoint_format: str | None = None,
    see: Callable[[LayerReport, int], None] | None = None,
) -> Result:
    """Rounds the weights of a language model's blocks, block by block, and, if asked, corrects its outputs.

    Where ``torch.distributed`` is initialized, the processes share the calibration's batches and the rows of the
    weights; all are to be called alike, and get the same result.

    Args:
        model: with its blocks in an ``nn.ModuleList``, called as ``model(input_ids=...)``, such as a causal language
            model of transformers. It is not changed. Or a :class:`opt8bit.ptq.Checkpoint`, of which only the block that
            is worked on is in memory.
        calibration: token ids (samples, length), int64; or batches for ``model(**batch)``, each with ``input_ids``
            and, where there is padding, ``attention_mask``, both (sequences, length); what else there is begins with
            these dimensions, too.
        method: rounds; see :mod:`opt8bit.ptq.methods`.
        bits: of a weight, 2 to 8.
        group_size: weights of a row that share a scale; it divides every layer's inputs. None for whole rows.
        symmetric: whether the grid's zero point is fixed in its middle, as servers want it (and the command, at 4 and 8
            bits, does it).
        range: "minmax" or "mse"; by default "mse", and "minmax" for RTN, which it hurts. See :class:`UniformGrid`.
        grid: any other grid, such as ``CodebookGrid(normal_float(4))``; ``bits``, ``symmetric`` and ``range`` are then
            its own and must be left as they are.
        correct: "none", "local", "sequential" or "joint"; see :class:`Recipe`.
        statistic: "mean", "median" or "position".
        error_propagation: strength of the asymmetric target, 0 to 1; by default 0.5, and 0 where it has no place:
            for RTN, which looks at no inputs, and for ``correct="local"``, which would undo it.
        overrides: for layers by the pattern of their names (``*``, ``?`` and ``[...]`` as a shell has them): any of
            ``method``, ``bits``, ``group_size``, ``symmetric``, ``range`` and ``grid``, the others as above; or None to
            leave the layers as they are. The last pattern that fits is the one.
        held_out: as ``calibration``: text to tell by how good the result is, of which nothing is learned.
        batch_size: sequences that go through a block together, where ``calibration`` is a tensor.
        work: a folder for what is finished, so that the same call goes on from there if it did not end. The result
            reads its layers from there: keep it until they are exported.
        checkpoint_format: of :func:`export`, if the result is meant for it: what it cannot hold is refused at once,
            and what servers will not run is said.
        see: called after each layer with its report and the number of layers.

    Returns:
        The compressed layers and a report; ``result.compressed_model()`` is the model, :func:`export` writes it.

    Raises:
        TypeError, ValueError: an argument is none of these, or arguments contradict each other; ``group_size`` does not
            divide a layer; a weight, or what a layer sees, is not finite; a weight is not in memory; two layers share
            one weight; the model has PEFT's adapters; no blocks are found, or a model's use of them cannot be followed.
            The message names the layer.
        RuntimeError: the model's own code raised an exception, which is the cause.
        ImportError: greenlet is not installed.

    Warns:
        UserWarning: blocks have matrices outside linear layers, such as fused experts, which stay as they are; or
            linear layers that do, because they are not called exactly once with all tokens, or return no tensor; or
            experts that see fewer tokens than they have features, and are rounded to nearest from min to max. Or
            servers will not run what ``checkpoint_format`` is to hold, or the machine's memory may not suffice.
    """
    greenlets()
    source = _source(model)
    refuse_quantized(getattr(source.model, "config", None))
    _check_loaded(source)
    options: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "range": range,
        "grid": grid,
    }
    check_method("method", method)
    if error_propagation is None:
        error_propagation = ERROR_PROPAGATION if method.uses_hessian and correct != "local" else 0.0
    whole = {"error_propagation": error_propagation, "correct": correct, "statistic": statistic}
    recipe = recipe_for(source.model, options, overrides, whole)
    batches = _batches("calibration", calibration, batch_size, source.model)
    kept = [] if held_out is None else _batches("held_out", held_out, batch_size, source.model)
    if correct != "none" and sum(len(batch["input_ids"]) for batch in batches) < 2:
        raise ValueError("one sequence says nothing about how far its mean error can be trusted: give two at least")
    if checkpoint_format is not None:
        check_format(checkpoint_format, source, recipe)
    _check_layers(source, recipe)
    if ranks.size() > 1:
        _check_ranks(recipe, batches)
    if checkpoint_format is not None and not ranks.rank():
        warn_of_servers(checkpoint_format, source, recipe)
    _warn_of_others(source.model)
    begun = None if work is None else Work(Path(work), _identity(source, recipe, batches, kept))
    batches, kept = ranks.share(batches), ranks.share(kept)
    warn_of_memory(source.model, [*batches, *kept], recipe, in_memory=isinstance(source, Loaded))
    return run(source, batches, recipe, see or (lambda report, layers: None), held_out=kept, work=begun)


def _source(model: nn.Module | Source) -> Source:
    if isinstance(model, Source):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, or ptq.Checkpoint(folder), got {model!r}")
    return InMemory(unwrapped(model))


def _check_loaded(source: Source) -> None:
    if not isinstance(source, Loaded):
        return
    for name, param in source.model.named_parameters():
        if param.is_meta:
            raise ValueError(
                f"{name} is on the meta device, its values elsewhere, maybe on disk: give a checkpoint's folder as "
                "ptq.Checkpoint(folder), of which one block at a time is in memory"
            )
    devices = {str(param.device) for param in source.model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"the model is spread over {', '.join(sorted(devices))}: put it on one device")


def _warn_of_others(model: nn.Module) -> None:
    others = other_matrices(model)
    if not others or ranks.rank():
        return
    left = sum(param.numel() for param in others.values())
    total = left + sum(matrix(layer).numel() for layer in block_layers(model).values())
    warn(
        f"{left:,} of the blocks' {total:,} weights are in no nn.Linear or Conv1D layer and stay as they are: "
        f"{first_of(list(others), NAMED)}"
    )


def _check_ranks(recipe: Recipe, batches: list[dict[str, Tensor]]) -> None:
    if len(batches) < ranks.size():
        raise ValueError(f"{ranks.size()} processes have {len(batches)} batches to share: give more, or smaller ones")
    if recipe.correct != "none" and recipe.statistic != "mean":
        raise ValueError(f"several processes share means alone, got statistic={recipe.statistic!r}")


def _identity(source: Source, recipe: Recipe, *texts: list[dict[str, Tensor]]) -> dict[str, str]:
    """What the result depends on, told from other runs'."""
    tokens = [digest(tensor for batch in text for _, tensor in sorted(batch.items())) for text in texts]
    return {
        "options": repr(recipe),
        "dtype": str(next(source.model.parameters()).dtype),
        "model": digest(tensor for _, tensor in source.tensors()) + _configuration(source.model),
        "calibration text": tokens[0],
        "held-out text": tokens[1],
        "number of processes": str(ranks.size()),
        "device": texts[0][0]["input_ids"].device.type,
        "version": f"{version('opt8bit')}, layout {LAYOUT}",
    }


def _configuration(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    return f" {zlib.crc32(config.to_json_string().encode()):08x}" if hasattr(config, "to_json_string") else ""


def _check_layers(source: Source, recipe: Recipe) -> None:
    layers = block_layers(source.model)
    _check_overrides(recipe, layers)
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        weight, own = matrix(layer), recipe.of(name)
        owner = owners.setdefault(id(layer.weight) if weight.is_meta else weight.data_ptr(), name)
        if owner != name:
            raise ValueError(f"{name}: shares its weight with {owner}: it cannot be rounded for both")
        try:
            if own is not None:
                own.scheme.groups_of(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    prefix, blocks = find_blocks(source.model)
    for name, param in source.model.named_parameters():
        if not name.startswith(f"{prefix}.") and not bool(torch.isfinite(param).all()):
            raise ValueError(f"{name} is not finite")
    for i in range(len(blocks)):
        with source.block(f"{prefix}.{i}") as block:
            for name, layer in linear_layers(block).items():
                if not bool(torch.isfinite(matrix(layer)).all()):
                    raise ValueError(f"{prefix}.{i}.{name}: a weight is not finite")


def _check_overrides(recipe: Recipe, layers: Mapping[str, nn.Module]) -> None:
    for override in recipe.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in layers):
            raise ValueError(f"overrides[{override.pattern!r}] fits no layer; there is {min(layers)}, for example")
    if all(recipe.of(name) is None for name in layers):
        raise ValueError("overrides leave every layer as it is")


def _batches(name: str, calibration: Calibration, batch_size: int, model: nn.Module) -> list[dict[str, Tensor]]:
    # Of a checkpoint the blocks' parameters are on the meta device.
    device = next((param.device for param in model.parameters() if not param.is_meta), torch.device("cpu"))
    if isinstance(calibration, Tensor):
        check_count("batch_size", batch_size)
        check_token_ids(name, calibration, model)
        return [{"input_ids": part.to(device)} for part in calibration.split(batch_size)]
    given = list(calibration) if isinstance(calibration, Iterable) else [calibration]
    for batch in given:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{name} must be one tensor of token ids (samples, length), or mappings that have input_ids, "
                f"got {type(batch).__name__}"
            )
    if not given or any("input_ids" not in batch for batch in given):
        raise ValueError(f"{name} must be token ids (samples, length) or batches that have input_ids")
    for i, batch in enumerate(given):
        _check_batch(f"of {name}'s batch {i}", batch, model)
    return [{key: value.to(device) for key, value in batch.items()} for batch in given]


def _check_batch(where: str, batch: Mapping[str, Tensor], model: nn.Module) -> None:
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key} {where} must be a tensor, got {type(value).__name__}")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    check_token_ids(f"input_ids {where}", ids, model)
    for key, value in batch.items():
        # Batches are cut into sequences, and the hidden states of a sequence go by its tokens.
        if value.shape[: None if key == "attention_mask" else 2] != ids.shape:
            more = "" if key == "attention_mask" else ", ..."
            raise ValueError(
                f"{key} {where} must be (sequences, length{more}) as input_ids, {tuple(ids.shape)}, "
                f"got shape {tuple(value.shape)}"
            )
    if mask is not None and not bool(mask.any()):
        raise ValueError(f"attention_mask {where} leaves no token that counts")
