"""``compress``: the front door. Everything is checked here, before hours are spent."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.backends import first_of, warn
from opt8bit.ptq import ranks
from opt8bit.ptq.export import check_format, warn_of_servers
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model.blocks import block_layers, find_blocks, linear_layers, matrix, other_matrices
from opt8bit.ptq.model.origin import refuse_quantized, unwrapped
from opt8bit.ptq.model.source import InMemory, Loaded, Source, digest
from opt8bit.ptq.model.walk import greenlets
from opt8bit.ptq.naming import named
from opt8bit.ptq.need import warn_of_memory
from opt8bit.ptq.pipeline import run
from opt8bit.ptq.plan import LayerPlan, Plan, plan_for
from opt8bit.ptq.refinement.refine import check_can_learn, refine, set_aside
from opt8bit.ptq.result import Result, Step
from opt8bit.ptq.resume import LAYOUT, Work
from opt8bit.ptq.tasks.causal_lm import CausalLM
from opt8bit.ptq.tasks.task import Batch, Calibration, Task
from opt8bit.quant.contract import check_grid
from opt8bit.quant.described import described
from opt8bit.recipe.learning import EFFORTS
from opt8bit.recipe.recipe import Recipe, changed
from opt8bit.recipe.registry import FORMATS
from opt8bit.recipe.runtimes import check_reads, packed_format

CAUSAL_LM = CausalLM()
NAMED = 3  # of the weights that a warning is about
TRIED = 2  # rows of a weight that a grid is tried on


def compress(
    model: nn.Module | Source,
    calibration: Calibration,
    recipe: Recipe | None = None,
    *,
    held_out: Calibration | None = None,
    batch_size: int = 8,
    work: str | Path | None = None,
    checkpoint_format: str | None = None,
    runtime: str | None = None,
    task: Task = CAUSAL_LM,
    see: Callable[[LayerReport, int], None] | None = None,
    see_step: Callable[[Step], None] | None = None,
    **options: Any,
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
        recipe: what is to become of the layers; by default that of 4 bits, ``Recipe()``.
        held_out: as ``calibration``: text to tell by how good the result is, of which nothing is learned.
        batch_size: sequences that go through a block together, where ``calibration`` is a tensor.
        work: a folder for what is finished, so that the same call goes on from there if it did not end. The result
            reads its layers from there: keep it until they are exported.
        checkpoint_format: of :func:`export`, if the result is meant for it: what it cannot hold is refused at once,
            and what servers will not run is said.
        runtime: what is to run the result, a name of :data:`opt8bit.recipe.runtimes.RUNTIMES`. Grids, group size and
            packing that the recipe leaves open are those that it reads best, and what it does not run is refused at
            once. ``checkpoint_format`` is then by default what it reads codes in.
        task: what the model is for.
        see: called after each layer with its report and the number of layers, such as
            :class:`opt8bit.ptq.progress.LayerBar`, which shows a bar.
        see_step: called after each step of :func:`refine`, where the recipe says ``learn``.
        **options: fields of the recipe, in place of its own: ``compress(model, ids, bits=3)``.

    Returns:
        The compressed layers and a report; ``result.compressed_model()`` is the model, :func:`export` writes it.

    Raises:
        TypeError, ValueError: an argument is none of these, or arguments contradict each other; ``group_size`` does not
            divide a layer; a weight, or what a layer sees, is not finite; a weight is not in memory; two layers share
            one weight; the model has PEFT's adapters; no blocks are found, or a model's use of them cannot be followed.
            The message names the layer. Or the runtime does not read the format, or not run what it is to hold.
        RuntimeError: the model's own code raised an exception, which is the cause.
        ImportError: greenlet is not installed.

    Warns:
        UserWarning: blocks have matrices outside linear layers, such as fused experts, which stay as they are; or
            linear layers that do, because they are not called exactly once with all tokens, or return no tensor; or
            experts that see fewer tokens than they have features, and are rounded to nearest from min to max. Or
            servers will not run what ``checkpoint_format`` is to hold, or the machine's memory may not suffice.
    """
    recipe = changed(recipe or Recipe(), options)
    greenlets()
    source = _source(model)
    refuse_quantized(getattr(source.model, "config", None))
    _check_loaded(source)
    if runtime is not None and checkpoint_format is None:
        checkpoint_format = packed_format(runtime)
    if checkpoint_format is not None:
        FORMATS.check(checkpoint_format)
        runtime = runtime or FORMATS[checkpoint_format].runtime
        check_reads(runtime, checkpoint_format)
    plan = plan_for(source.model, recipe, checkpoint_format, runtime)
    batches = task.batches("calibration", calibration, batch_size, source.model)
    kept = [] if held_out is None else task.batches("held_out", held_out, batch_size, source.model)
    batches, chosen = _divided(batches, source, plan, task)
    if checkpoint_format is not None:
        check_format(checkpoint_format, source, plan)
    _check_layers(source, plan)
    if plan.transforms or plan.learns:
        _check_rewritable(source)
    if ranks.size() > 1:
        _check_ranks(plan, batches)
    if checkpoint_format is not None and runtime is None and not ranks.rank():
        warn_of_servers(checkpoint_format, source, plan)
    _warn_of_others(source.model)
    begun = None if work is None else Work(Path(work), _identity(source, plan, batches, kept))
    batches, kept = ranks.share(batches), ranks.share(kept)
    warn_of_memory(source.model, [*batches, *kept], plan, in_memory=isinstance(source, Loaded))
    result = run(source, batches, plan, task, see or (lambda report, layers: None), held_out=kept, work=begun)
    if not plan.learns:
        return result
    effort = EFFORTS[plan.recipe.learn]
    return refine(
        result,
        batches,
        steps=effort.steps,
        windows=effort.windows,
        choose_by=chosen,
        held_out=kept or None,
        see=see_step,
    )


def _divided(batches: list[Batch], source: Source, plan: Plan, task: Task) -> tuple[list[Batch], list[Batch]]:
    """Returns the batches that layers are rounded on, and those that tell what is kept of learning.

    Raises:
        ValueError: there are too few, or ``task`` is not that of causal language models, and they are to be learned.
    """
    chosen: list[Batch] = []
    if plan.learns:
        if not isinstance(task, CausalLM):
            raise ValueError(f"learn is for causal language models: it must be 'none' for the task {task!r}")
        check_can_learn(source, batches, EFFORTS[plan.recipe.learn].windows)
        batches, chosen = set_aside(batches)
    if plan.bias_correction != "none" and sum(len(batch["input_ids"]) for batch in batches) < 2:
        raise ValueError("one sequence says nothing about how far its mean error can be trusted: give two at least")
    return batches if plan.reconstruction is None else plan.reconstruction.batches(batches), chosen


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


def _check_rewritable(source: Source) -> None:
    """
    Raises:
        ValueError: a parameter that a transform may change, or learning, stands in other parts in the source's
            checkpoint.
    """
    prefix, blocks = find_blocks(source.model)
    for name, param in blocks.named_parameters(prefix):
        if param.dim() == 1 and source.stored_name(name) is None:
            raise ValueError(f"{name} is in other parts in the checkpoint: leave transforms and learn out")


def _check_ranks(plan: Plan, batches: list[dict[str, Tensor]]) -> None:
    if len(batches) < ranks.size():
        raise ValueError(f"{ranks.size()} processes have {len(batches)} batches to share: give more, or smaller ones")
    if plan.reconstruction is not None:
        raise ValueError(f"reconstruction is for a single process, got {ranks.size()}")
    if plan.bias_correction != "none" and plan.statistic != "mean":
        raise ValueError(f"several processes share means alone, got statistic={plan.statistic!r}")


def _identity(source: Source, plan: Plan, *texts: list[dict[str, Tensor]]) -> dict[str, str]:
    """Returns what the result depends on, which distinguishes it from other runs'."""
    tokens = [digest(tensor for batch in text for _, tensor in sorted(batch.items())) for text in texts]
    return {
        "options": described(plan.recipe),
        "what is outside of the blocks": described(plan.outside),
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


def _check_layers(source: Source, plan: Plan) -> None:
    layers = block_layers(source.model)
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        weight, own = matrix(layer), plan.of(name)
        owner = owners.setdefault(id(layer.weight) if weight.is_meta else weight.data_ptr(), name)
        if owner != name:
            raise ValueError(f"{name}: shares its weight with {owner}: it cannot be rounded for both")
        if own is not None:
            with named(name):
                own.scheme.groups_of(weight)
    _check_values(source, plan)


def _check_values(source: Source, plan: Plan) -> None:
    """
    Raises:
        TypeError, ValueError: a number is not finite, or a grid is not as it must be.
    """
    prefix, blocks = find_blocks(source.model)
    tried: set[type] = set()  # classes of grids
    for name, param in source.model.named_parameters():
        if not name.startswith(f"{prefix}.") and not bool(torch.isfinite(param).all()):
            raise ValueError(f"{name} is not finite")
    for i in range(len(blocks)):
        with source.block(f"{prefix}.{i}") as block:
            for name, layer in linear_layers(block).items():
                if not bool(torch.isfinite(matrix(layer)).all()):
                    raise ValueError(f"{prefix}.{i}.{name}: a weight is not finite")
                own = plan.of(f"{prefix}.{i}.{name}")
                if own is not None:
                    with named(f"{prefix}.{i}.{name}"):
                        _try_grids(own, matrix(layer), tried)


def _try_grids(plan: LayerPlan, weight: Tensor, tried: set[type]) -> None:
    """Tries the grids of a layer whose classes have not been tried yet on its first rows.

    Raises:
        TypeError, ValueError: one is not as a grid must be.
    """
    for grid in plan.method.grids(plan.scheme):
        if type(grid) not in tried:
            tried.add(type(grid))
            rows = weight[:TRIED].to(torch.promote_types(weight.dtype, torch.float32))
            check_grid(grid, rows.unflatten(1, (-1, plan.scheme.groups_of(weight))))
