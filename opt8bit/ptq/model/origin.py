"""Checks that a model can be compressed: a causal language model that has all its weights, and only its own."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from opt8bit.ptq.model.quantization_header import KEYS

# What is put before a model's names, by whom, and what to do about it.
PREFIXES: Mapping[str, str] = {
    "_orig_mod.": "torch.compile puts there: save the model that was compiled, model._orig_mod",
    "module.": "DataParallel and DDP put there: save the model inside, model.module",
    "base_model.model.": "PEFT puts there: merge the adapter and save what model.merge_and_unload() returns",
    "_fsdp_wrapped_module.": "FSDP1 puts there: save FSDP's full state dict",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model within ``torch.compile``'s.

    Raises:
        ValueError: it is one of PEFT's, whose weights are those of its base and its adapters together.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "peft_config") and hasattr(inner, "merge_and_unload"):
        raise ValueError(f"{type(inner).__name__} has adapters: merge them first, model = model.merge_and_unload()")
    return inner


def refuse_quantized(config: Any) -> None:
    """
    Raises:
        ValueError: a configuration is that of a quantized model.
    """
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is not None:
        has = quantization if isinstance(quantization, dict) else vars(quantization)
        raise ValueError(f"the model is quantized already, by {has.get('quant_method')}: compress the original")


def remove_header(config: Any) -> None:
    """Makes a configuration that of a model which is not quantized, in all its parts."""
    for part in (config, *vars(config).values()):
        for key in KEYS:
            if key in getattr(part, "__dict__", {}):
                delattr(part, key)


def refuse_other_classes(config: Any) -> None:
    """
    Raises:
        ValueError: a configuration is that of a model of transformers which predicts no next token.
    """
    transformers: Any = importlib.import_module("transformers")
    names: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    generating = {
        *names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name) and name not in generating and not name.endswith("ForConditionalGeneration"):
            raise ValueError(
                f"the model is a {name}, which is no causal language model: it has no head for next tokens"
            )


def refuse_made_up(missing: Collection[str], stored: Collection[str]) -> None:
    """
    Args:
        missing: names of the model's weights that its checkpoint lacks, for which transformers takes random ones.
        stored: names in the checkpoint that are not the model's.

    Raises:
        ValueError: there is such a name.
    """
    if not missing:
        return
    message = f"the checkpoint lacks {len(missing)} of the model's weights, {min(missing)} first"
    for prefix, about in PREFIXES.items():
        if any(name.startswith(prefix) for name in stored):
            raise ValueError(f"{message}: its names begin with {prefix!r}, which {about}")
    raise ValueError(message)
