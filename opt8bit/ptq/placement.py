"""Where a model's layers can hold a bias, so that whoever loads its checkpoint uses it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.layer import Compressed

OWN = "own"
THROUGH = "through "
VALUES, OUTPUTS = "v_proj", ("o_proj", "out_proj")

Places = dict[str, "str | None"]


def bias_places(model: nn.Module, names: Iterable[str], statistic: str = "mean") -> Places:
    """For each layer, what lets it hold a bias of a statistic.

    Returns:
        "own" where it has one; the name of the model configuration's switch that gives it one, such as
        ``attention_bias``; "through NAME" for attention values without one whose output projection NAME can hold it:
        attention weights sum to 1, so a constant passes through them unchanged (one by position does not). None
        where the architecture has no place for it: whoever loads the checkpoint would drop it.
    """
    modules = dict(model.named_modules())
    places: Places = {name: None if modules[name].bias is None else OWN for name in names}
    for switch in _off(model):
        for name in _enabled_by(model, switch) & places.keys():
            places[name] = places[name] or switch
    for name, place in list(places.items()):
        output = _output_of(name, places)
        if place is None and output is not None and statistic != "position":
            places[name] = THROUGH + output
    return places


def switches(places: Places) -> list[str]:
    """The switches of the configuration that the places ask for."""
    return sorted({place for place in places.values() if place and place != OWN and not place.startswith(THROUGH)})


def with_switches(model: nn.Module, names: Iterable[str]) -> Any:
    """A copy of the model's configuration with these switches on."""
    config: Any = copy.deepcopy(model.config)
    for name in names:
        setattr(config, name, True)
    return config


def _off(model: nn.Module) -> list[str]:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return sorted(name for name, value in values.items() if "bias" in name and value is False)


def _enabled_by(model: nn.Module, switch: str) -> set[str]:
    """The layers that gain a bias when the switch is on; none, if anything but linear layers changes with it."""
    try:
        with torch.device("meta"):
            switched = type(model)(with_switches(model, [switch]))
    except TypeError:  # a class that a configuration alone does not make: no loader makes it, either
        return set()
    had = {name: param.shape for name, param in model.named_parameters()}
    has = {name: param.shape for name, param in switched.named_parameters()}
    gained = {name.removesuffix(".bias") for name in has.keys() - had.keys()}
    modules = dict(model.named_modules())
    if any(has.get(name) != shape for name, shape in had.items()):
        return set()
    return gained if all(isinstance(modules.get(name), nn.Linear) for name in gained) else set()


def _output_of(name: str, places: Places) -> str | None:
    """The output projection beside attention values, if it can hold a bias itself."""
    parent, _, own = name.rpartition(".")
    candidates = [f"{parent}.{output}" for output in OUTPUTS if own == VALUES]
    return next((output for output in candidates if places.get(output)), None)


def value_bias_through(places: Places, layers: dict[str, Compressed], model: nn.Module) -> None:
    """Moves the biases of attention values that have no place of their own into the output projections, exactly."""
    for name, layer in list(layers.items()):
        place = places.get(name)
        if place is None or not place.startswith(THROUGH) or layer.bias is None:
            continue
        output = layers[place.removeprefix(THROUGH)]
        weight = output.installed
        moved = weight @ _per_query_head(layer.bias, weight.shape[1], model).to(weight)
        bias = moved if output.bias is None else output.bias + moved
        layers[name] = replace(layer, bias=None)
        layers[place.removeprefix(THROUGH)] = replace(output, bias=bias)


def _per_query_head(bias: Tensor, features: int, model: nn.Module) -> Tensor:
    """A bias of the values as the output projection sees it: heads that share values repeat them."""
    shared = features // len(bias)
    if shared == 1:
        return bias
    config: Any = model.config
    head = features // config.num_attention_heads
    return bias.view(-1, head).repeat_interleave(shared, 0).flatten()
