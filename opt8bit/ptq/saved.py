"""What a model's tensors are in its checkpoint: transformers 5 renames some on loading, and puts others together."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def as_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as its ``save_pretrained`` writes them: under other names, maybe, and in other parts."""
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:  # before version 5 models had what their checkpoints have
        return dict(tensors)
    return loading.revert_weight_conversion(model, dict(tensors))


def saved_name(model: nn.Module, name: str, tensor: Tensor) -> str | None:
    """The name in the checkpoint; None if it is not the tensor itself that is there."""
    tensor = tensor.to("meta")
    saved = as_saved(model, {name: tensor})
    return next(iter(saved)) if _is_itself(saved, tensor) else None


def saved_layer(model: nn.Module, name: str) -> str:
    """A linear layer's name in the checkpoint, where its weight is as in the model."""
    saved = saved_name(model, f"{name}.weight", model.get_parameter(f"{name}.weight"))
    return name if saved is None else saved.removesuffix(".weight")


def check_saved(model: Any, *, packed: bool) -> None:
    """Whether a model's tensors can be written one after another as its checkpoints have them.

    Args:
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
