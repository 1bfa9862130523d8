"""Finds what to compress in a model: its blocks, and in each the layers that multiply by a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.products import fast_products


def is_linear(module: nn.Module) -> bool:
    """Tells whether it is ``nn.Linear``, or GPT-2's Conv1D, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that transformers need not be installed.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def matrix(layer: nn.Module) -> Tensor:
    """Returns the weight of a linear layer as (out, in), sharing its memory."""
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr]
    return weight.T if _is_conv1d(layer) else weight


def as_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns a weight (out, in) as the layer has its own."""
    return weight.T if _is_conv1d(layer) else weight


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Returns a block's linear layers by name."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the blocks of a model and their name: of all outermost lists of modules, the one with most weights.

    Lists outside the model's decoder, where transformers says which part that is, do not count: vision towers have
    blocks, too.

    Raises:
        ValueError: no list of modules has linear layers in each of them.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _are_blocks(module):
            found[name] = module
    if not found:
        raise ValueError(
            f"no blocks found in {type(model).__name__}: expected an nn.ModuleList of modules that each have "
            "nn.Linear or Conv1D layers"
        )
    inside = _decoder(model)
    candidates = [name for name in found if f"{name}.".startswith(inside)] or list(found)
    name = max(candidates, key=lambda name: sum(matrix(layer).numel() for layer in linear_layers(found[name]).values()))
    return name, found[name]


def _decoder(model: nn.Module) -> str:
    """Returns what the names in a model's decoder begin with, or nothing where the model does not name one."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    names = [name for name, module in model.named_modules() if module is decoder]
    return f"{names[0]}." if names and names[0] else ""


def block_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers of all its blocks, by their names in the model.

    Raises:
        ValueError: it has no blocks.
    """
    prefix, blocks = find_blocks(model)
    return {
        f"{prefix}.{i}.{name}": layer for i, block in enumerate(blocks) for name, layer in linear_layers(block).items()
    }


def other_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns matrices outside linear layers that blocks may multiply by, such as fused experts, by name.

    Raises:
        ValueError: it has no blocks.
    """
    prefix, blocks = find_blocks(model)
    layers, params = block_layers(model), blocks.named_parameters(prefix)
    return {name: param for name, param in params if param.dim() >= 2 and name.rpartition(".")[0] not in layers}


def by_pattern(about: Mapping[str, str], prefix: str, blocks: int) -> list[tuple[str, str]]:
    """Merges what is said about the layers of all blocks: ``*`` stands for the number of any block."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name, why in about.items():
        number, _, own = name.removeprefix(f"{prefix}.").partition(".")
        numbers.setdefault((own, why), []).append(number)
    return [
        (f"{prefix}.{number}.{own}", why)
        for (own, why), found in numbers.items()
        for number in (["*"] if len(found) == blocks > 1 else found)
    ]


def _are_blocks(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(linear_layers(module) and not is_linear(module) for module in modules)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Turns off dropout and gradients, and turns on fast products, inside the context; restores every module's mode."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), fast_products():
            yield
    finally:
        for module in training:
            module.training = True
