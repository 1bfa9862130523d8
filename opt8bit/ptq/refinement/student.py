"""A compressed model whose scales, norms and biases are parameters, while its codes stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import as_stored, find_blocks, is_linear, linear_layers, matrix
from opt8bit.ptq.naming import named
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight, hardened, started
from opt8bit.ptq.result import Change, Result
from opt8bit.quant.weight import QuantizedWeight


class Trained(Protocol):
    """One parameter of a model that is trained by way of others."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimizer changes."""
        ...

    def collect(self) -> None:
        """Takes the gradient that the model's parameter has got to these."""

    def install(self) -> None:
        """Puts what these stand for into the model, after a step."""

    def change(self) -> Change:
        """Returns what is stored of it."""
        ...


class TrainedMatrix:
    """The weight of a compressed layer.

    Args:
        layer: of the model.
        weight: that is trained.
        dtype: in which the layer is to have it.
    """

    def __init__(self, layer: nn.Module, weight: TrainedWeight, dtype: torch.dtype) -> None:
        self.layer, self.weight = layer, weight
        own: Any = layer.weight
        layer.weight = nn.Parameter(own.detach().to(dtype))
        self.install()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.weight.parameters())

    def collect(self) -> None:
        param: Any = self.layer.weight
        if param.grad is not None:
            with torch.enable_grad():
                weight = self.weight.weight(1.0)
            weight.backward(as_stored(self.layer, param.grad).to(weight.dtype))
            param.grad = None

    @torch.no_grad()
    def install(self) -> None:
        self.weight.confine()
        matrix(self.layer).copy_(self.weight.weight(1.0))

    def change(self) -> Change:
        return hardened(self.weight)


class TrainedVector:
    """The weight or bias of a norm, or the bias of a layer.

    It is trained in float32, and the model computes with the nearest values of the dtype in which it is stored.

    Args:
        module: that has it.
        kind: "weight" or "bias".
        dtype: in which it is stored.
    """

    def __init__(self, module: nn.Module, kind: str, dtype: torch.dtype) -> None:
        self.module, self.kind, self.dtype = module, kind, dtype
        own = getattr(module, kind).detach()
        self.value = nn.Parameter(own.clone())
        setattr(module, kind, nn.Parameter(own.clone()))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.value]

    def collect(self) -> None:
        param = getattr(self.module, self.kind)
        if param.grad is not None:
            self.value.grad = param.grad if self.value.grad is None else self.value.grad + param.grad
            param.grad = None

    @torch.no_grad()
    def install(self) -> None:
        getattr(self.module, self.kind).copy_(self.change())

    def change(self) -> Tensor:
        return self.value.detach().to(self.dtype, copy=True)


class Student:
    """The model of a result, made ready to be trained.

    Args:
        result: of a compression; it stays as it is.
        parametrization: of the weights.
        products: dtype of the matrices of linear layers.
        biases: whether biases are trained that the result has not set.

    Attributes:
        model: all of it but these matrices in float32, or float64 if that is the result's.
        trained: by the name of the parameter in the model.
    """

    def __init__(
        self, result: Result, parametrization: Parametrization, products: torch.dtype, *, biases: bool
    ) -> None:
        self.model = result.compressed_model().eval().requires_grad_(False)
        dtypes = {name: param.dtype for name, param in self.model.named_parameters()}
        for param in self.model.parameters():
            param.data = param.data.to(torch.promote_types(param.dtype, torch.float32))
        self.trained: dict[str, Trained] = {}
        prefix, _ = find_blocks(self.model)
        for name, change in result.changes.items():
            if isinstance(change, QuantizedWeight) and name.startswith(f"{prefix}."):
                layer = self.model.get_submodule(name.rpartition(".")[0])
                with named(name):
                    weight = started(parametrization, matrix(layer), change)
                self.trained[name] = TrainedMatrix(layer, weight, products)
        by_position = {
            name for name, change in result.changes.items() if isinstance(change, Tensor) and change.dim() > 1
        }
        for name, module, kind in _vectors(self.model):
            asked_for = biases or name in result.changes or not is_linear(module)
            if asked_for and name not in by_position:
                self.trained[name] = TrainedVector(module, kind, dtypes[name])
        for layer in linear_layers(self.model).values():  # those that are not trained, such as the head
            own: Any = layer.weight
            if own.dtype != products:
                layer.weight = nn.Parameter(own.detach().to(products), requires_grad=False)  # no longer the embedding's

    @property
    def scales(self) -> list[nn.Parameter]:
        """Parameters of weights."""
        return [p for each in self.trained.values() if isinstance(each, TrainedMatrix) for p in each.parameters]

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Norms and biases."""
        return [p for each in self.trained.values() if isinstance(each, TrainedVector) for p in each.parameters]

    @cached_property
    def of_blocks(self) -> list[list[Trained]]:
        """The parts of each block that are trained."""
        prefix, blocks = find_blocks(self.model)
        return [
            [each for name, each in self.trained.items() if name.startswith(f"{prefix}.{i}.")]
            for i in range(len(blocks))
        ]

    def install(self) -> None:
        """Puts what the parameters stand for into the model."""
        for each in self.trained.values():
            each.install()

    def changes(self) -> dict[str, Change]:
        """Returns what is stored of everything that is trained, by name."""
        return {name: each.change() for name, each in self.trained.items()}


def _vectors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields the norms of a model, and the biases of its blocks' layers: names, modules, and what they call them."""
    prefix, _ = find_blocks(model)
    for name, param in list(model.named_parameters()):
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        is_bias = is_linear(module) and kind == "bias" and name.startswith(f"{prefix}.")
        if param.dim() == 1 and kind in ("weight", "bias") and (is_bias or "norm" in type(module).__name__.lower()):
            yield name, module, kind
