"""Finds a model's tensors in its checkpoint: transformers 5 renames some on loading, and puts others together."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

# Types of models whose experts transformers replaces by layers of their own when it finds packed weights.
TAKEN_APART = ("llama4", "llama4_text")


def as_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of a model as its ``save_pretrained`` writes them: under other names, and maybe in parts."""
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:  # before version 5 models had what their checkpoints have, if under other names
        return {_older_name(model, name): tensor for name, tensor in tensors.items()}
    return loading.revert_weight_conversion(model, dict(tensors))


def _older_name(model: nn.Module, name: str) -> str:
    """Returns the name that transformers 4 saves a tensor under: models with a vision tower keep those of before."""
    renamed: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", {})
    for pattern, prefix in renamed.items():
        if name.startswith(f"{prefix}."):
            return re.sub(r"\(.*\)", "", pattern.lstrip("^")) + name.removeprefix(prefix)
    return name


def saved_name(model: nn.Module, name: str, tensor: Tensor) -> str | None:
    """Returns the name that a tensor is saved under, or None if it is not the tensor itself that is saved."""
    tensor = tensor.to("meta")
    saved = as_saved(model, {name: tensor})
    return next(iter(saved)) if _is_itself(saved, tensor) else None


def stored_names(model: nn.Module, stored: Collection[str]) -> dict[str, str]:
    """Returns the name in a checkpoint of each of a model's tensors, without those that are not there as they are.

    A tensor is stored under its own name, or the one it is saved under. Where the names begin with the base model's
    prefix, that may be missing, or be another one: composite models have their text models under one of theirs. A
    shared tensor is stored under any of its names.

    Args:
        model: of transformers.
        stored: names in the checkpoint.
    """
    aliases = _aliases(model)
    match = _matcher(model, aliases, stored)
    found = {name: match(names) for name, names in aliases.items()}
    if None in found.values():
        tensors = model.state_dict()
        for name, names in aliases.items():
            saved = [saved_name(model, alias, tensors[alias]) for alias in names]
            found[name] = match([alias for alias in saved if alias is not None])
    return {name: there for name, there in found.items() if there is not None}


def stored_parts(model: nn.Module, stored: Collection[str]) -> set[str]:
    """Returns the names in a checkpoint of all tensors that a model's are made of, alone or together."""
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    match = _matcher(model, tensors, stored)
    return {found for found in (match([name]) for name in (*tensors, *as_saved(model, tensors))) if found is not None}


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Returns all names of each parameter and buffer, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _matcher(
    model: nn.Module, names: Collection[str], stored: Collection[str]
) -> Callable[[Iterable[str]], str | None]:
    """Returns a function that finds the first of some names of a model's that is stored, under whatever prefix.

    Args:
        model: whose base model's prefix is replaced.
        names: of all its tensors.
        stored: names in the checkpoint.
    """
    stored, base = set(stored), f"{getattr(model, 'base_model_prefix', '')}."
    inner = [name.removeprefix(base) for name in names if name.startswith(base)]
    others = {name.removesuffix(inner[0]) for name in stored if name.endswith(f".{inner[0]}")} if inner else set()
    # Another prefix is that of the same model only if everything is there under it.
    prefixes = [base, "", *sorted(other for other in others if all(other + name in stored for name in inner))]

    def match(some: Iterable[str]) -> str | None:
        for name in some:
            candidates = [name, base + name]
            if name.startswith(base):
                candidates = [name, *(prefix + name.removeprefix(base) for prefix in prefixes)]
            found = next((candidate for candidate in candidates if candidate in stored), None)
            if found is not None:
                return found
        return None

    return match


def check_saved(model: Any, *, packed: bool) -> None:
    """Checks that a model's tensors can be written one after another as its checkpoints have them.

    Args:
        model: of transformers.
        packed: whether some are packed, beside which transformers 5 loads no tensors that it has to put together.

    Raises:
        ValueError: they cannot; the message names one.
    """
    kind = f"models of type {getattr(model.config, 'model_type', type(model).__name__)}"
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    all_shapes = _shapes(as_saved(model, tensors))
    for name, tensor in tensors.items():
        saved = as_saved(model, {name: tensor})
        if not _shapes(saved).items() <= all_shapes.items():
            raise ValueError(f"{kind} cannot be exported: in checkpoints {name} is in one with other tensors")
        if packed and not _is_itself(saved, tensor):
            raise ValueError(
                f"{kind} have {name} in other parts in checkpoints, which transformers cannot load beside packed "
                "weights: use format 'dense'"
            )


def check_packed(model: Any, weights: Iterable[str]) -> None:
    """Checks that transformers would load packed weights where those of layers are stored.

    Args:
        model: of transformers.
        weights: names of layers' weights in the checkpoint.

    Raises:
        ValueError: it would not.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind in TAKEN_APART:
        raise ValueError(
            f"models of type {kind} have experts in one tensor, which transformers looks for one by one beside packed "
            "weights: use format 'dense'"
        )
    odd = [name for name in weights if not name.endswith(".weight")]
    if odd:
        raise ValueError(f"{odd[0]} does not end with .weight, as names of packed weights must: use format 'dense'")


def _is_itself(saved: Mapping[str, Tensor], tensor: Tensor) -> bool:
    return [id(part) for part in saved.values()] == [id(tensor)]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
