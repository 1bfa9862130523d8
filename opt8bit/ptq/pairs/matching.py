"""Finds the modules of a float model that are corrected, and their counterparts in the quantized one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.correction.folding import CONVOLUTIONS, channel_axis_of
from opt8bit.ptq.correction.placing import COMPENSATION
from opt8bit.ptq.model.blocks import is_linear
from opt8bit.ptq.model.running import Running

Selector = type[nn.Module] | str
Selectors = Selector | Sequence[Selector] | None


class Pair(NamedTuple):
    """A module of the float model and the one of the same name in the quantized model.

    Attributes:
        name: of both; empty for the models themselves.
        reference, quantized: the modules.
        channel_axis: dimension of the channels in their output, from the back.
    """

    name: str
    reference: nn.Module
    quantized: nn.Module
    channel_axis: int

    @property
    def title(self) -> str:
        """The name of the pair in messages."""
        return self.name or "the model"

    def contains(self, other: Pair) -> bool:
        """Tells whether the other one's modules lie in this one's."""
        return other.name != self.name and (not self.name or other.name.startswith(f"{self.name}."))


class Matches(NamedTuple):
    """Lists what is corrected, and what is not, with the reason."""

    pairs: list[Pair]
    skipped: dict[str, str]  # as asked for
    unmatched: dict[str, str]  # because the models do not fit


def match(
    quantized: nn.Module,
    reference: nn.Module,
    layers: Selectors,
    leave: Selectors,
    channel_axis: int,
) -> Matches:
    """Pairs the modules of two models by name.

    Args:
        quantized, reference: the models.
        layers: classes of the float model's modules, or patterns of names as ``fnmatch`` has them. None selects linear
            layers and convolutions.
        leave: those of them that are left as they are.
        channel_axis: of modules that are neither linear layers nor convolutions.

    Raises:
        ValueError: a pattern or a class selects nothing.
    """
    selectors, left = _selectors(layers), _selectors(leave)
    modules = dict(reference.named_modules())
    for selector in selectors or ():
        if not any(_selects(selector, name, module) for name, module in modules.items()):
            shown = repr(selector) if isinstance(selector, str) else selector.__name__
            raise ValueError(f"layers must select modules of {type(reference).__name__}, {shown} selects none")
    counterparts = dict(quantized.named_modules())
    result = Matches([], {}, {})
    for name, module in modules.items():
        if not _is_selected(name, module, selectors):
            continue
        if any(_selects(selector, name, module) for selector in left or ()):
            result.skipped[name] = "it is among those to leave"
            continue
        other = counterparts.get(name)
        if other is module:
            result.skipped[name] = "it is one module in both models"
            continue
        why = f"{type(quantized).__name__} has no such module" if other is None else _mismatch(module, other)
        if why is not None or other is None:
            result.unmatched[name] = str(why)
            continue
        axis = channel_axis_of(module)
        result.pairs.append(Pair(name, module, other, channel_axis if axis is None else axis))
    return result


def without_unquantized(matches: Matches, quantized: Running, reference: Running) -> Matches:
    """Leaves out layers that do in both models the same: to see the same inputs, they have no error but rounding."""
    rest, skipped = [], dict(matches.skipped)
    for pair in matches.pairs:
        if _is_alike(pair) and _has_equal_tensors(pair, quantized, reference):
            skipped[pair.name] = "it was not quantized: it has no error of its own"
        else:
            rest.append(pair)
    return Matches(rest, skipped, matches.unmatched)


def _is_alike(pair: Pair) -> bool:
    """Tells whether a layer has the float model's class, and nothing on it changes what goes in or comes out."""
    layer, other = pair.reference, pair.quantized
    if type(layer) is not type(other) or layer._modules or other._modules:
        return False
    return not ("forward" in vars(other) or other._forward_hooks or other._forward_pre_hooks)


def _has_equal_tensors(pair: Pair, quantized: Running, reference: Running) -> bool:
    quantized.need(pair.name)
    reference.need(pair.name)
    layer, other = pair.reference, pair.quantized
    tensors, others = ({**each._parameters, **each._buffers} for each in (layer, other))
    return tensors.keys() == others.keys() and all(_are_equal(tensors[name], others[name]) for name in tensors)


def _are_equal(tensor: Tensor | None, other: Tensor | None) -> bool:
    if tensor is None or other is None:
        return tensor is other
    alike = (tensor.dtype, tensor.device) == (other.dtype, other.device)
    return alike and type(tensor) is type(other) and torch.equal(tensor, other)


def already_corrected(quantized: nn.Module) -> list[str]:
    """Returns the modules of a model behind which a bias stands already."""
    return [name for name, module in quantized.named_modules() if COMPENSATION in module._modules]


def generations(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Sorts the pairs so that each comes after those within it: what a block does wrong depends on its layers."""
    rest, result = list(pairs), []
    while rest:
        inner = [pair for pair in rest if not any(pair.contains(other) for other in rest)]
        result.append(inner)
        rest = [pair for pair in rest if pair not in inner]
    return result


def _selectors(given: Selectors) -> list[Selector] | None:
    if given is None:
        return None
    return [given] if isinstance(given, str | type) else list(given)


def _is_selected(name: str, module: nn.Module, selectors: list[Selector] | None) -> bool:
    if selectors is None:
        return is_linear(module) or isinstance(module, tuple(CONVOLUTIONS))
    return any(_selects(selector, name, module) for selector in selectors)


def _selects(selector: Selector, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, selector) if isinstance(selector, str) else isinstance(module, selector)


def _mismatch(module: nn.Module, other: nn.Module) -> str | None:
    """Returns why two modules cannot be a pair, or None. Packed weights may have other shapes if classes differ."""
    weights = [getattr(each, "weight", None) for each in (module, other)]
    shapes = [tuple(weight.shape) for weight in weights if isinstance(weight, Tensor)]
    if type(module) is type(other) and len(shapes) == 2 and shapes[0] != shapes[1]:
        return f"its weight has shape {shapes[1]}, the reference's {shapes[0]}"
    return None
