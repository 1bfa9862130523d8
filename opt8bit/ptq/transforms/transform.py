"""Defines a transform: a scale for the channels of links. Applying and proving it is common to all."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import is_linear, matrix
from opt8bit.ptq.model.folding import SINGLE, Link, doubled, fold, relative_difference
from opt8bit.ptq.model.links import find_links
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.naming import named


class Transform(ABC):
    """Chooses how a block is rewritten: a frozen dataclass."""

    @abstractmethod
    def scale(self, block: nn.Module, link: Link) -> Tensor | None:
        """Returns by what the channels of a link's producer are multiplied, and its consumers' columns divided.

        Args:
            block: of the link; it stays as it is.
            link: found in it.

        Returns:
            (channels of the producer,), not zero, and positive where the link takes no other; 1 where no input of the
            consumers follows a channel. None to leave the link as it is.
        """


ROOM = 8.0  # times its rounding before, by which a block may be off after it was rewritten


class NotTheSame(ValueError):
    """A block that was rewritten computes something else."""


def transformed(
    name: str, block: nn.Module, call: Call, transforms: Sequence[Transform], seen: Sequence[Call] = ()
) -> dict[str, Tensor]:
    """Rewrites a block, and checks that it computes what it did.

    Each transform is applied to a copy in float64 as well, whose outputs are compared with those of the block as it
    was. The block itself may be further from them than before only by what its dtype loses of the new weights.

    Args:
        name: of the block, for messages.
        block: is rewritten in place.
        call: of it, with few tokens, by which links are found.
        transforms: one after another.
        seen: calls with what the block sees in use, on which it is compared, too.

    Returns:
        The changed parameters by their names in the block, as they are now.

    Raises:
        NotTheSame: it does not compute the same.
        TypeError, ValueError: a transform returned no scale for the channels.
    """
    had = {param: tensor.detach().clone() for param, tensor in block.named_parameters()}
    links = find_links(block, call)
    before, exact, reference = copy.deepcopy(block), copy.deepcopy(block).double(), copy.deepcopy(block).double()
    for transform in transforms:
        for link in links:
            with named(f"{name}.{link.producer}"):
                version = _version(block)
                scale = checked_scale(transform, link, transform.scale(block, link), _channels(block, link))
                if _version(block) != version:
                    raise ValueError(f"{type(transform).__name__}.scale must leave the block as it is")
            if scale is not None:
                fold(block, link, scale)
                fold(exact, link, scale)
    for each in (call, *seen):
        with torch.no_grad():
            expected = doubled(each).of(reference)
            errors = [relative_difference(doubled(each).of(exact), expected)]
            errors += [relative_difference(each.of(own), expected) for own in (block, before)]
        # NaN is no good either.
        if not errors[0] <= SINGLE:
            raise NotTheSame(f"{name}: {transforms} change what the block computes, by {errors[0]:.1e} of its output")
        if not errors[1] <= max(SINGLE, ROOM * errors[2]):
            raise NotTheSame(
                f"{name}: after {transforms} the block, in its own dtype, is off by {errors[1]:.1e} of its output, and "
                f"by {errors[2]:.1e} before"
            )
    return {param: tensor.detach() for param, tensor in block.named_parameters() if not torch.equal(tensor, had[param])}


def _version(block: nn.Module) -> int:
    """Rises when a parameter is changed in place."""
    return sum(param._version for param in block.parameters())


def _channels(block: nn.Module, link: Link) -> int:
    """Returns the number of the producer's channels."""
    producer: Any = block.get_submodule(link.producer)
    return len(matrix(producer) if is_linear(producer) else producer.weight)


def checked_scale(transform: Transform, link: Link, scale: Any, channels: int) -> Tensor | None:
    """Returns what a transform has returned, if it is what it has to return.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape, or a factor by which no channel of the link can be multiplied.
    """
    if scale is None:
        return None
    name = f"{type(transform).__name__}.scale"
    if not isinstance(scale, Tensor):
        raise TypeError(f"{name} must return a tensor ({channels},), or None, got {type(scale).__name__}")
    if scale.shape != (channels,):
        raise ValueError(f"{name} must return ({channels},), got {tuple(scale.shape)}")
    wrong = ~scale.isfinite() | (scale == 0 if link.negative else scale <= 0)
    if bool(wrong.any()):
        allowed = "finite and not 0" if link.negative else "finite and above 0"
        raise ValueError(f"{name} must be {allowed} for this link, got {float(scale[wrong][0])}")
    return scale
