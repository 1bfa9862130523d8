"""Places a correction of a module's output: in a bias of the module, or in a module behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.correction.compensation import BiasCompensation
from opt8bit.ptq.correction.folding import raised

COMPENSATION = "bias_compensation"  # the name of the module behind another one, in that one
NEAR = 0.05  # of a trial's bias, by which outputs in 16 bits may miss it
Read = Callable[[Any], Tensor]
Write = Callable[[Any, Tensor], Any]


class BiasPlace(NamedTuple):
    """Says where a module keeps its bias: among its parameters, or among its buffers."""

    values: dict[str, Any]
    are_parameters: bool

    @staticmethod
    def of(layer: nn.Module) -> BiasPlace | None:
        """Returns the place of a bias that the state dict has, or None where the module has no place for one."""
        if "bias" in layer._parameters:
            return BiasPlace(layer._parameters, True)
        if "bias" in layer._buffers and "bias" not in layer._non_persistent_buffers_set:
            return BiasPlace(layer._buffers, False)
        return None

    @property
    def bias(self) -> Tensor | None:
        """The bias that is there."""
        return self.values["bias"]

    def set(self, bias: Tensor) -> None:
        """Puts another one there. The tensor that was there does not change."""
        self.values["bias"] = nn.Parameter(bias, requires_grad=False) if self.are_parameters else bias


class Placed(ABC):
    """A correction and its place."""

    @property
    @abstractmethod
    def words(self) -> str:
        """Says what the place is."""

    @abstractmethod
    def put(self) -> None:
        """Corrects the module's output."""

    @abstractmethod
    def take_away(self) -> None:
        """Leaves the module as it was."""


class InBias(Placed):
    """A correction in a module's bias, which it has or has a place for."""

    def __init__(self, layer: nn.Module, shift: Tensor, dtype: torch.dtype) -> None:
        place = BiasPlace.of(layer)
        assert place is not None
        self._place, self._had = place, place.bias
        had = self._had
        if had is None:
            weight = getattr(layer, "weight", None)
            keeps = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1
            self._bias = shift.to(dtype=weight.dtype if keeps else dtype)  # type: ignore[union-attr]
        else:
            self._bias = raised(had.detach(), shift)

    @property
    def words(self) -> str:
        return "new bias" if self._had is None else "bias"

    def put(self) -> None:
        self._place.set(self._bias)

    def take_away(self) -> None:
        self._place.values["bias"] = self._had


class Behind(Placed):
    """A correction by a :class:`BiasCompensation` behind a module.

    It is a child of the module by the name ``bias_compensation``, so that it moves, is copied and is saved with the
    model, whose other names and classes stay as they are. A forward hook, which is a plain function and survives
    ``copy.deepcopy`` and pickling, adds it to the output.
    """

    def __init__(self, layer: nn.Module, compensation: BiasCompensation, read: Read, write: Write) -> None:
        self._layer, self._compensation = layer, compensation
        self._hook = partial(_compensated, read, write)
        self._handle: Any = None

    @property
    def words(self) -> str:
        return "BiasCompensation"

    def put(self) -> None:
        if self._handle is None:
            self._layer.add_module(COMPENSATION, self._compensation.train(self._layer.training))
            self._handle = self._layer.register_forward_hook(self._hook)

    def take_away(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            delattr(self._layer, COMPENSATION)
            self._handle = None


def _compensated(read: Read, write: Write, module: nn.Module, args: Any, output: Any) -> Any:
    return write(output, module.get_submodule(COMPENSATION)(read(output)))


def takes_bias(
    layer: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    read: Read,
    channel_axis: int,
) -> bool:
    """Tells whether what is added to a module's bias is added to its output. A trial determines it, whatever the class.

    Args:
        layer: is left as it was.
        arguments: that it has been called with.
        read: finds the tensor in its output.
        channel_axis: of the channels in that, from the back.
    """
    place = BiasPlace.of(layer)
    if place is None:
        return False
    args, kwargs = _of_one_sample(*arguments)
    had = place.bias
    output = read(layer(*args, **kwargs))
    channels = output.shape[channel_axis]
    if had is not None and (had.shape != (channels,) or not had.is_floating_point()):
        return False
    size = float(output.abs().max()) or 1.0
    signs = torch.randint(2, (channels,), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    trial = (signs * size).to(output)
    try:
        place.set(trial if had is None else had.detach() + trial.to(had))
        change = read(layer(*args, **kwargs)) - output
    except Exception:  # the class cannot do with a bias
        return False
    finally:
        place.values["bias"] = had
    trial = trial.view(-1, *[1] * (-channel_axis - 1))
    return bool(((change - trial).abs() <= NEAR * size).all())


def _of_one_sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dim() < 2:
        return args, kwargs
    return (args[0][:1],), kwargs
