"""Where a model's layers can hold a bias, so that whoever loads its checkpoint uses it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def bias_places(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str | None]:
    """For each layer, what lets it hold a bias.

    Returns:
        "own" where it has one; the name of the model configuration's switch that gives it one, such as
        ``attention_bias``; None where the architecture has no place for it and a loader would drop it.
    """
    places: dict[str, str | None] = {name: "own" if layer.bias is not None else None for name, layer in layers.items()}
    for switch in _switches(model):
        for name in _enabled_by(model, [switch]) & layers.keys():
            places[name] = places[name] or switch
    return places


def _switches(model: nn.Module) -> list[str]:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return sorted(name for name, value in values.items() if "bias" in name and value is False)


def _enabled_by(model: nn.Module, switches: list[str]) -> set[str]:
    """The layers that gain a bias when the switches are on; none, if anything else changes with them."""
    with torch.device("meta"):
        switched = type(model)(with_switches(model, switches))
    shapes = {name: param.shape for name, param in model.named_parameters()}
    found = {name: param.shape for name, param in switched.named_parameters()}
    gained = found.keys() - shapes.keys()
    modules = dict(model.named_modules())
    linear = all(name.endswith(".bias") and isinstance(modules.get(name[:-5]), nn.Linear) for name in gained)
    if not linear or any(found.get(name) != shape for name, shape in shapes.items()):
        return set()
    return {name[:-5] for name in gained}


def with_switches(model: nn.Module, switches: list[str]) -> Any:
    """A copy of the model's configuration with the switches on."""
    config: Any = copy.deepcopy(model.config)
    for switch in switches:
        setattr(config, switch, True)
    return config
