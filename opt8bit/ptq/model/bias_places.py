"""Finds where a model's layers can hold a bias, so that whoever loads its checkpoint uses it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from opt8bit.ptq.model.servers import who_skips
from opt8bit.recipe.runtimes import SERVERS, Runtime

KEYS, VALUES, OUTPUTS = "k_proj", "v_proj", ("o_proj", "out_proj")
OF_KEYS = "a constant in the keys shifts all scores alike, or harms under rotary embedding"
LLAMA = "LlamaForCausalLM"


class Place(NamedTuple):
    """Says what lets a layer hold a bias.

    Attributes:
        kind: "own" for a bias that it has; "switch" of the model's configuration; the same of "llama", where the model
            is one except for its name and is written as such; "through" another layer.
        name: of the switch, or of the other layer.
    """

    kind: str
    name: str = ""

    def __str__(self) -> str:
        words = {"own": "own", "switch": self.name, "llama": f"{self.name} of {LLAMA}"}
        return words.get(self.kind, f"{self.kind} {self.name}")


Places = dict[str, "Place | None"]


def bias_places(model: nn.Module, names: Iterable[str], statistic: str = "mean") -> Places:
    """Returns, for each layer, what lets it hold a bias of a statistic.

    Attention weights sum to 1, so that a constant passes from the values through to the output projection unchanged;
    one by position does not. None where the architecture has no place: who loads the checkpoint would drop the bias.
    """
    modules = dict(model.named_modules())
    places: Places = {name: None if modules[name].bias is None else Place("own") for name in names}
    found = [(Place("switch", switch), model.config, type(model)) for switch in _off(getattr(model, "config", None))]
    llama = _as_llama(model)
    if llama is not None:
        config, llama_class = llama
        found += [(Place("llama", switch), config, llama_class) for switch in _off(config)]
    for place, config, model_class in found:
        for name in _enabled_by(model, config, model_class, place.name) & places.keys():
            places[name] = places[name] or place
    for name, place in list(places.items()):
        output = _output_of(name, places)
        if place is None and output is not None and statistic != "position":
            places[name] = Place("through", output)
    return places


def without_unused(places: Places, changed: Collection[str]) -> Places:
    """Returns the places without the switches by which no layer got a bias.

    Args:
        places: of all layers.
        changed: names of the parameters that the model has got, or that have changed.
    """
    used = {place for name, place in places.items() if f"{name}.bias" in changed}

    def is_used(place: Place | None) -> bool:
        return place is None or place.kind not in ("switch", "llama") or place in used

    return {name: place if is_used(place) else None for name, place in places.items()}


def why_uncorrected(name: str, places: Places) -> str | None:
    """Returns why a layer gets no correction, or None where it gets one.

    What a constant in the keys adds to the scores of a query is the same for all positions, and lost in the softmax.
    Under rotary embedding it is not the same, and has been seen to do harm.
    """
    if places[name] is None:
        return "the checkpoint has no place for a bias here"
    return OF_KEYS if name.rpartition(".")[2] == KEYS else None


def skipped_by_servers(
    model: nn.Module, name: str, places: Places, runtimes: Sequence[Runtime] = SERVERS
) -> str | None:
    """Says which servers load a layer's bias from the written checkpoint and do not use it, or returns None."""
    place = places[name]
    holder = place.name if place is not None and place.kind == "through" else name
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if any(each is not None and each.kind == "llama" for each in places.values()):
        kind = "llama"  # as which it is written
    return who_skips(kind, holder.rpartition(".")[2], runtimes)


def config_with_places(model: nn.Module, places: Iterable[Place | None]) -> Any:
    """Returns the configuration of a model whose layers hold biases in these places."""
    used = {place for place in places if place is not None}
    switches = {kind: [place.name for place in used if place.kind == kind] for kind in ("switch", "llama")}
    if not switches["llama"]:
        return _with_switches(model.config, switches["switch"])
    llama = _as_llama(model)
    assert llama is not None
    config = _with_switches(llama[0], switches["llama"])
    config.architectures = [LLAMA]
    return config


def _as_llama(model: nn.Module) -> tuple[Any, type[nn.Module]] | None:
    """Returns the configuration and the class that make the same model as a LLaMA, with its switches, or None.

    Mistral and Qwen2 are LLaMAs except for their names, unless their attention sees a window; and Qwen2's queries, keys
    and values have biases, which the switch gives LLaMA's.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    sees_a_window = {
        "mistral": lambda: config.sliding_window is not None,
        "qwen2": lambda: config.use_sliding_window,
    }
    if (
        kind not in sees_a_window
        or sees_a_window[kind]()
        or type(model).__name__ != f"{type(config).__name__[:-6]}ForCausalLM"
    ):
        return None
    transformers: Any = importlib.import_module("transformers")
    own = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    known = transformers.LlamaConfig().to_dict().keys()
    llama = transformers.LlamaConfig(**{name: value for name, value in own.items() if name in known})
    return llama, transformers.LlamaForCausalLM


def _with_switches(config: Any, names: Iterable[str]) -> Any:
    config = copy.deepcopy(config)
    for name in names:
        setattr(config, name, True)
    return config


def _off(config: Any) -> list[str]:
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return sorted(name for name, value in values.items() if "bias" in name and value is False)


def _enabled_by(model: nn.Module, config: Any, model_class: type[Any], switch: str) -> set[str]:
    """Returns the layers that a switch gives a bias; none, if it changes anything except linear layers."""
    try:
        with torch.device("meta"):
            switched = model_class(_with_switches(config, [switch]))
    except TypeError:  # a class that a configuration alone does not make: no loader makes it, either
        return set()
    had = {name: param.shape for name, param in model.named_parameters()}
    has = {name: param.shape for name, param in switched.named_parameters()}
    gained = {name.removesuffix(".bias") for name in has.keys() - had.keys()}
    modules = dict(model.named_modules())
    if any(has.get(name) not in (shape, None) for name, shape in had.items()):
        return set()
    lost = {name.removesuffix(".bias") for name in had.keys() - has.keys()}
    if model_class is type(model) and lost:
        return set()
    return gained if all(isinstance(modules.get(name), nn.Linear) for name in gained | lost) else set()


def _output_of(name: str, places: Places) -> str | None:
    """Returns the output projection beside attention values, if it can hold a bias itself."""
    parent, _, own = name.rpartition(".")
    candidates = [f"{parent}.{output}" for output in OUTPUTS if own == VALUES]
    return next((output for output in candidates if places.get(output)), None)
