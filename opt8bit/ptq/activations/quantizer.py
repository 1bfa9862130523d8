"""What a quantizer of inputs has to say; a model's layers are made to use it here."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import block_layers, evaluating
from opt8bit.ptq.model.usage import watched


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
    """
    found: dict[str, InputQuantizer] = {}

    def see(name: str, x: Any, output: Any) -> None:
        if isinstance(x, Tensor):
            found.setdefault(name, make().to(x.device)).observe(x)

    with evaluating(model), watched(block_layers(model), see):
        for batch in batches:
            model(**batch)
    return found


def with_quantized_inputs(model: nn.Module, quantizers: Mapping[str, InputQuantizer]) -> nn.Module:
    """Returns a copy of a model whose layers see quantized inputs.

    Args:
        model: stays as it is.
        quantizers: by the names of layers.
    """
    result = copy.deepcopy(model)
    for name, quantizer in quantizers.items():
        layer = result.get_submodule(name)
        layer.add_module("input_quantizer", quantizer)
        layer.register_forward_pre_hook(_quantized)
    return result


def _quantized(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.input_quantizer(args[0]), *args[1:])
