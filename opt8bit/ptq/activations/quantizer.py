"""Defines what a quantizer of inputs has to say, and makes a model's layers use it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import block_layers, evaluating
from opt8bit.ptq.model.usage import watched
from opt8bit.ptq.naming import named


class InputQuantizer(nn.Module, ABC):
    """Rounds what one layer sees. It observes inputs first; what it has found is in buffers."""

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Takes in an input (..., in) of the calibration."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Returns the input with each number the nearest of its grid, in its own dtype.

        Raises:
            ValueError: nothing was observed, where that is needed.
        """


@torch.no_grad()
def calibrated(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], make: Callable[[], InputQuantizer]
) -> dict[str, InputQuantizer]:
    """Observes what the linear layers of a model's blocks see.

    Args:
        model: called as ``model(**batch)``; it stays as it is.
        batches: of the calibration.
        make: makes a quantizer.

    Returns:
        A quantizer for each layer that was called, by the layer's name.

    Raises:
        TypeError: a batch is not a mapping, or ``make`` does not make a quantizer.
        ValueError: no layer has seen anything, or a quantizer refuses what it sees. The message names the layer.
    """
    found: dict[str, InputQuantizer] = {}

    def see(name: str, x: Any, output: Any) -> None:
        if isinstance(x, Tensor):
            with named(name):
                if name not in found:
                    found[name] = _made(make).to(x.device)
                found[name].observe(x)

    with evaluating(model), watched(block_layers(model), see):
        for batch in batches:
            if not isinstance(batch, Mapping):
                expected = "mappings for model(**batch), such as {'input_ids': ids}"
                raise TypeError(f"batches must be {expected}, got a {type(batch).__name__}")
            model(**batch)
    if not found:
        raise ValueError("no layer has seen an input: batches must have one at least")
    return found


def _made(make: Callable[[], InputQuantizer]) -> InputQuantizer:
    """
    Raises:
        TypeError: it is not a quantizer of inputs.
    """
    made: Any = make() if callable(make) and not isinstance(make, nn.Module) else make
    if made is make or not isinstance(made, InputQuantizer):
        raise TypeError(f"make must be called to make an InputQuantizer, such as StaticPerTensor, got {make!r}")
    return made


def with_quantized_inputs(model: nn.Module, quantizers: Mapping[str, InputQuantizer]) -> nn.Module:
    """Returns a copy of a model whose layers see quantized inputs.

    Args:
        model: stays as it is.
        quantizers: by the names of layers; they stay as they are, too.

    Raises:
        TypeError: one is not an :class:`InputQuantizer`.
        ValueError: the model has no layer of a name; or, when it runs, a quantizer returns something of another shape.
    """
    result = copy.deepcopy(model)
    layers = block_layers(result)
    for name, quantizer in quantizers.items():
        if name not in layers:
            raise ValueError(
                f"quantizers: the model's blocks have no layer {name!r}; there is {min(layers)}, for example"
            )
        if not isinstance(quantizer, InputQuantizer):
            raise TypeError(f"{name}: quantizers must be InputQuantizers, got {quantizer!r}")
        layers[name].add_module("input_quantizer", copy.deepcopy(quantizer))
        layers[name].register_forward_pre_hook(partial(_quantized, name))
    return result


def _quantized(name: str, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, quantizer = args[0], module.input_quantizer
    found = quantizer(x)
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name}: {type(quantizer).__name__}.forward must return {tuple(x.shape)}, got {got}")
    return (found, *args[1:])
