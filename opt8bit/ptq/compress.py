"""``compress``: the front door. Everything is checked here, before hours are spent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import find_blocks, linear_layers, matrix
from opt8bit.ptq.evaluate import check_token_ids
from opt8bit.ptq.layer import Recipe
from opt8bit.ptq.methods import GPTQ, Format, Method, QuantEase
from opt8bit.ptq.pipeline import run
from opt8bit.ptq.result import LayerReport, Result
from opt8bit.ptq.walk import greenlets
from opt8bit.quant.grid import SCALE_DTYPES, Grid, UniformGrid

Calibration = Tensor | Iterable[Mapping[str, Tensor]]
ERROR_PROPAGATION = 0.5


def polished(start: Method) -> QuantEase:
    """A method with the polish that the default recipe has: a little descent, and the scales refitted, in turn."""
    return QuantEase(sweeps=5, start=start, refits=3)


DEFAULT_METHOD = polished(GPTQ())


def compress(
    model: nn.Module,
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
    batch_size: int = 8,
    see: Callable[[LayerReport, int], None] | None = None,
) -> Result:
    """Rounds the weights of a language model's blocks, block by block, and corrects its outputs.

    Args:
        model: with its blocks in an ``nn.ModuleList``, called as ``model(input_ids=...)``, such as a causal language
            model of transformers. It is not changed.
        calibration: token ids (samples, length), int64; or batches for ``model(**batch)``, each with ``input_ids``
            and, where there is padding, ``attention_mask``.
        method: rounds; see :mod:`opt8bit.ptq.methods`.
        bits: of a weight, 2 to 8.
        group_size: weights of a row that share a scale; it divides every layer's inputs. None for whole rows.
        symmetric: whether the grid's zero point is fixed in its middle.
        range: "minmax" or "mse"; by default "mse", and "minmax" for RTN, which it hurts. See :class:`UniformGrid`.
        grid: any other grid, such as ``CodebookGrid(normal_float(4))``; ``bits``, ``symmetric`` and ``range`` are then
            its own and must be left as they are.
        correct: "none", "local", "sequential" or "joint"; see :class:`Recipe`.
        statistic: "mean", "median" or "position".
        error_propagation: strength of the asymmetric target, 0 to 1; by default 0.5, and 0 where it has no place:
            for RTN, which looks at no inputs, and for ``correct="local"``, which would undo it.
        batch_size: sequences that go through a block together, where ``calibration`` is a tensor.
        see: called after each layer with its report and the number of layers.

    Returns:
        The compressed layers and a report; ``result.compressed_model()`` is the model, :func:`export` writes it.

    Raises:
        TypeError, ValueError: an argument is none of these, or arguments contradict each other; ``group_size`` does
            not divide a layer; a weight, or what a layer sees, is not finite; two layers share one weight; no blocks
            are found, or a model's use of them is not understood. The message names the layer.
        ImportError: greenlet is not installed.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be one of opt8bit.ptq, such as GPTQ(), got {method!r}")
    if grid is not None and not isinstance(grid, Grid):
        raise TypeError(f"grid must be one of opt8bit.quant, such as UniformGrid(4), got {grid!r}")
    greenlets()
    format = Format(_grid(method, bits, symmetric, range, grid, model), group_size)
    if error_propagation is None:
        error_propagation = ERROR_PROPAGATION if method.uses_hessian and correct != "local" else 0.0
    recipe = Recipe(method, format, error_propagation, correct, statistic)
    _check_layers(model, format)
    batches = _batches(calibration, batch_size, model)
    if correct != "none" and sum(len(batch["input_ids"]) for batch in batches) < 2:
        raise ValueError("one sequence says nothing about how far its mean error can be trusted: give two at least")
    return run(model, batches, recipe, see or (lambda report, layers: None))


def _grid(
    method: Method, bits: int, symmetric: bool, range: str | None, grid: Grid | None, model: nn.Module
) -> Grid:
    if grid is None:
        range = range or ("mse" if method.uses_hessian else "minmax")
        return UniformGrid(bits, symmetric=symmetric, range=range, scale_dtype=_scale_dtype(model))
    if (bits, symmetric, range) != (4, False, None):
        raise ValueError(f"bits, symmetric and range are those of grid={grid!r}: leave them out")
    return grid


def _scale_dtype(model: nn.Module) -> torch.dtype:
    """Scales are stored in the dtype of the weights, as packed checkpoints have them."""
    _, blocks = find_blocks(model)
    dtype = matrix(next(iter(linear_layers(blocks[0]).values()))).dtype
    return dtype if dtype in SCALE_DTYPES else torch.float32


def _check_layers(model: nn.Module, format: Format) -> None:
    prefix, blocks = find_blocks(model)
    owners: dict[int, str] = {}
    for i, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            full, weight = f"{prefix}.{i}.{name}", matrix(layer)
            owner = owners.setdefault(weight.data_ptr(), full)
            if owner != full:
                raise ValueError(f"{full}: shares its weight with {owner}: it cannot be rounded for both")
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{full}: a weight is not finite")
            try:
                format.groups_of(weight)
            except ValueError as error:
                raise ValueError(f"{full}: {error}") from error


def _batches(calibration: Calibration, batch_size: int, model: nn.Module) -> list[dict[str, Tensor]]:
    device = next(model.parameters()).device
    if isinstance(calibration, Tensor):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        check_token_ids("calibration", calibration, model)
        return [{"input_ids": part.to(device)} for part in calibration.split(batch_size)]
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in calibration]
    if not batches or any("input_ids" not in batch for batch in batches):
        raise ValueError("calibration must be token ids (samples, length) or batches that have input_ids")
    for i, batch in enumerate(batches):
        check_token_ids(f"input_ids of batch {i}", batch["input_ids"], model)
        if "attention_mask" in batch and not bool(batch["attention_mask"].any()):
            raise ValueError(f"attention_mask of batch {i} leaves no token that counts")
    return batches
