"""Rewriting a block along a link, and how far it is from what it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import is_linear, matrix
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.model.states import copied, flattened

SINGLE = 1e-5  # how far what follows a factor may be from it, relatively: some modules compute in float32 all the same


class Link(NamedTuple):
    """A producer and the layers that read what it puts out.

    Attributes:
        producer: name of a norm, or of a linear layer, in the block.
        consumers: names of the linear layers that read it, and nothing else does.
        channels: which channel of the producer each of the consumers' inputs follows, int64 (in,): several follow one
            where query heads share values.
        offset: what a norm adds to its weight before it multiplies by it: 1 for Gemma's, 0 for most.
        negative: whether a channel may also be multiplied by a negative number; not through a ReLU.
        shifts: whether a constant that is added to a channel arrives unchanged.
        error: of the trials, relative to the factors: 1e-15 or so; 1e-7 where a module computes in float32.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: Tensor
    offset: float = 0.0
    negative: bool = False
    shifts: bool = False
    error: float = 0.0


def scale_norm(norm: Any, factors: Tensor, offset: float) -> None:
    """Multiplies what a norm puts out, channel by channel, by a change of its parameters in place."""
    norm.weight.data = ((offset + norm.weight) * factors - offset).to(norm.weight)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = (norm.bias * factors).to(norm.bias)


@torch.no_grad()
def fold(block: nn.Module, link: Link, scale: Tensor) -> None:
    """Multiplies the channels of a link's producer, and divides the columns of its consumers, in place.

    Args:
        block: of the link.
        link: found in it.
        scale: (channels of the producer,), not zero; 1 where none of the consumers' inputs follows a channel.
    """
    producer: Any = block.get_submodule(link.producer)
    scale = scale.to(torch.promote_types(producer.weight.dtype, torch.float32))
    if is_linear(producer):
        weight = matrix(producer)
        weight.copy_((weight * scale[:, None]).to(weight))
        if producer.bias is not None:
            producer.bias.copy_((producer.bias * scale).to(producer.bias))
    else:
        scale_norm(producer, scale, link.offset)
    for name in link.consumers:
        weight = matrix(block.get_submodule(name))
        weight.copy_((weight / scale[link.channels]).to(weight))


def relative_error(call: Call, block: nn.Module, reference: nn.Module) -> float:
    """Returns how far two blocks' outputs for one call are apart, relative to the reference's."""
    return relative_difference(call.of(block), call.of(reference))


def relative_difference(output: Tensor, expected: Tensor) -> float:
    """Returns ``|y - ŷ| / |y|``."""
    return float((output.to(expected) - expected).norm() / expected.norm())


def doubled(call: Call) -> Call:
    """Returns the same call with every number in float64."""
    parts = [part for _, part in flattened((call.args, call.kwargs)) if isinstance(part, Tensor)]
    copies: dict[int, Any] = {id(part): part.double() for part in parts if part.is_floating_point()}
    args, kwargs = copied((call.args, call.kwargs), copies)
    return call._replace(hidden=call.hidden.double(), args=args, kwargs=kwargs)
