"""What a model's tensors are in its checkpoint: transformers 5 renames some on loading, and puts others together."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn


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
    """Returns the name that a tensor is saved under; None if it is not the tensor itself that is saved."""
    tensor = tensor.to("meta")
    saved = as_saved(model, {name: tensor})
    return next(iter(saved)) if _is_itself(saved, tensor) else None


def stored_names(model: nn.Module, stored: Collection[str]) -> dict[str, str]:
    """Returns the name in a checkpoint of each of a model's tensors, without those that are not there as they are.

    A tensor is stored under its own name, or the one it is saved under, with the base model's prefix or without it;
    a shared one under any of its names.

    Args:
        model: of transformers.
        stored: names in the checkpoint.
    """
    base = getattr(model, "base_model_prefix", "")
    aliases = _aliases(model)
    found = {name: _match(names, stored, base) for name, names in aliases.items()}
    if None in found.values():
        tensors = model.state_dict()
        for name, names in aliases.items():
            saved = [saved_name(model, alias, tensors[alias]) for alias in names]
            found[name] = _match([alias for alias in saved if alias is not None], stored, base)
    return {name: there for name, there in found.items() if there is not None}


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Returns all names of each parameter and buffer, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _match(names: Iterable[str], stored: Collection[str], base: str) -> str | None:
    """Returns the first of the names that is stored, as it is, or without or with the base model's prefix."""
    for name in names:
        for candidate in (name, name.removeprefix(f"{base}."), f"{base}.{name}"):
            if candidate in stored:
                return candidate
    return None


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


def _is_itself(saved: Mapping[str, Tensor], tensor: Tensor) -> bool:
    return [id(part) for part in saved.values()] == [id(tensor)]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
