"""Finds which norm or linear layer of a block feeds which linear layers, by trial, with no table of names.

A link is a place where a block can be rewritten and compute the same: channels of the producer are multiplied, or moved
by a constant, and the weights of its consumers undo it. The trials run on a copy of the block in float64. What a module
computes in float32 all the same, as some norms do, is known to that precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import is_linear, linear_layers
from opt8bit.ptq.model.folding import SINGLE, Link, doubled, fold, relative_error, scale_norm
from opt8bit.ptq.model.passes import Call, ModelError
from opt8bit.ptq.model.usage import watched
from opt8bit.ptq.model.value_rows import value_rows

EXTENTS = (2.0**-8, 2.0**8)  # by which factors are multiplied, so that a bound such as that of ReLU6 is met
TRIALS = 6  # of random hidden states: a channel behind a ReLU is zero for all tokens of one now and then


def find_links(block: nn.Module, call: Call) -> list[Link]:
    """Finds the links inside a block.

    Args:
        block: stays as it is.
        call: of it, with few tokens.

    Returns:
        Those that are sure: every input of the consumers follows one channel, and no other module reads any of them.
        None in a block that leaves linear layers out in a pass, such as those of experts: who reads what is not known.
    """
    trial = _Trial(block, call)
    if any(seen.keys() != trial.layers.keys() for seen in trial.inputs):
        return []
    found = []
    for producer in trial.producers:
        link = trial.link(producer)
        if link is not None:
            found.append(link)
    return found


class _Trial:
    """Passes through a copy of a block in float64.

    Attributes:
        block: the copy.
        calls: of it, with other hidden states each.
        inputs: of each call, what each linear layer sees.
        producers: names of norms and linear layers, in the order of their calls.
    """

    def __init__(self, block: nn.Module, call: Call) -> None:
        self.block = copy.deepcopy(block).double()
        first = doubled(call)
        generator = torch.Generator().manual_seed(0)
        spread = first.hidden.std()
        others = [torch.randn(first.hidden.shape, generator=generator, dtype=torch.float64) for _ in range(TRIALS - 1)]
        self.calls = [first, *(first._replace(hidden=(other.to(spread) * spread)) for other in others)]
        self.layers = linear_layers(self.block)
        self.sizes: dict[str, int] = {}  # channels of each producer
        self.inputs = [self._seen(each, note=self._note) for each in self.calls]

    @property
    def producers(self) -> list[str]:
        return list(self.sizes)

    def _note(self, name: str, output: Any) -> None:
        module = self.block.get_submodule(name)
        weight: Any = getattr(module, "weight", None)
        is_norm = isinstance(weight, Tensor) and weight.dim() == 1
        if isinstance(output, Tensor) and (is_norm or is_linear(module)):
            self.sizes.setdefault(name, output.shape[-1])

    def _seen(self, call: Call, note: Callable[[str, Any], None] | None = None) -> dict[str, Tensor]:
        """Returns what each linear layer sees in a pass, (tokens, in)."""
        seen: dict[str, Tensor] = {}

        def see(name: str, x: Any, output: Any) -> None:
            if name in self.layers and isinstance(x, Tensor):
                seen[name] = x.detach().flatten(0, -2)
            if note is not None:
                note(name, output)

        modules = {name: module for name, module in self.block.named_modules() if name}
        with torch.no_grad(), watched(modules, see):
            call.of(self.block)
        return seen

    def link(self, producer: str) -> Link | None:
        """Returns the link that begins at a producer, or None if none does."""
        size = self.sizes[producer]
        factors = _distinct(size)
        found = self._followers(producer, factors)
        if not found and producer in self.layers:
            rows = self._value_rows(producer)
            if rows is not None:  # of a layer that puts out queries and keys, too
                factors = torch.ones(size, dtype=torch.float64)
                factors[rows] = _distinct(len(rows))
                found = self._followers(producer, factors)
        if not found:
            return None
        channels = next(iter(found.values()))
        consumers = tuple(name for name, own in found.items() if torch.equal(own, channels))
        return self._checked(Link(producer, consumers, channels), factors)

    def _followers(self, producer: str, factors: Tensor, by: float = 1.0) -> dict[str, Tensor]:
        """Returns the layers each of whose inputs is multiplied by a factor other than 1, and by which.

        Args:
            producer: whose channels are multiplied.
            factors: by what.
            by: what those that are not 1 are multiplied by, besides.
        """
        whole = torch.where(factors == 1, 1, factors * by)
        with changed_output(self.block, producer, lambda y: y * whole):
            after = [self._seen(call) for call in self.calls]
        after = [{name: x / by for name, x in seen.items()} for seen in after]
        found = {}
        for name in self.layers:
            if any(
                seen.get(name, factors).shape != had[name].shape for seen, had in zip(after, self.inputs, strict=True)
            ):
                continue  # the tokens go elsewhere
            before, now = (torch.cat([seen[name] for seen in passes]) for passes in (self.inputs, after))
            channels = _followed(before, now, factors)
            if channels is not None and bool((factors[channels] != 1).all()):
                found[name] = channels
        return found

    def _value_rows(self, producer: str) -> Tensor | None:
        for reader in self.layers:
            rows = value_rows(self.block, self.calls[0], producer, reader)
            if rows is not None:
                return rows
        return None

    def _checked(self, link: Link, factors: Tensor) -> Link | None:
        """Returns the complete link, or None if other modules read what the consumers read."""
        module = self.block.get_submodule(link.producer)
        if not is_linear(module):
            offset = _offset(module, self.sizes[link.producer])
            if offset is None:
                return None
            link = link._replace(offset=offset)
        # As far as channels are followed at all: the others of the producer are queries and keys.
        is_odd = torch.arange(len(factors)) % 2 == 1
        signs = torch.where(is_odd & _is_followed(link, len(factors)), -factors, factors)
        link = link._replace(negative=set(link.consumers) <= self._followers(link.producer, signs).keys())
        if not all(set(link.consumers) <= self._followers(link.producer, factors, by).keys() for by in EXTENTS):
            return None  # a bound comes between them, which only some outputs reach
        link = link._replace(shifts=self._shifts(link))
        error = self._error(link, factors)
        return None if error is None else link._replace(error=error)

    def _shifts(self, link: Link) -> bool:
        followed = _is_followed(link, self.sizes[link.producer])
        constants = torch.arange(1, len(followed) + 1, dtype=torch.float64) / len(followed) * followed
        with changed_output(self.block, link.producer, lambda y: y + constants):
            after = self._seen(self.calls[0])
        for name in link.consumers:
            moved = after[name] - self.inputs[0][name]
            if not torch.allclose(moved, constants[link.channels].expand_as(moved), rtol=0, atol=SINGLE):
                return False
        return True

    def _error(self, link: Link, factors: Tensor) -> float | None:
        """Returns how far the block moves when the link is used, or None if that is more than rounding."""
        scale = torch.where(_is_followed(link, len(factors)), factors, 1)
        rewritten = copy.deepcopy(self.block)
        fold(rewritten, link, scale)
        try:
            with torch.no_grad():
                error = max(relative_error(call, rewritten, self.block) for call in self.calls)
        except ModelError:
            return None
        return error if error <= SINGLE else None


def _is_followed(link: Link, channels: int) -> Tensor:
    """Tells for each of the producer's channels whether an input of the consumers follows it."""
    return torch.isin(torch.arange(channels), link.channels)


def _distinct(count: int) -> Tensor:
    """Factors above 1 and below 2, all others."""
    return 1 + torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)


def _followed(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """Returns which factor each column of what a layer sees was multiplied by, int64 (in,), or None if one has none."""
    tiny = before.abs().amax(0, keepdim=True) * 1e-6
    counts = before.abs() > tiny
    if not bool(counts.any(0).all()):
        return None
    ratios = torch.where(counts, after / torch.where(counts, before, 1), torch.nan)
    middle = ratios.nanmedian(0).values
    order = torch.argsort(factors)
    near = torch.searchsorted(factors[order].contiguous(), middle.contiguous()).clamp(1, len(factors) - 1)
    below, above = factors[order][near - 1], factors[order][near]
    nearest = torch.where((middle - below).abs() <= (above - middle).abs(), near - 1, near)
    channels = order[nearest]
    off = (ratios - factors[channels]).abs()
    return channels if bool((torch.where(counts, off, 0) <= SINGLE).all()) else None


def _offset(norm: nn.Module, size: int) -> float | None:
    """Returns what a norm adds to its weight before it multiplies by it, or None if it does neither."""
    x = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = _distinct(size)
    with torch.no_grad():
        expected = norm(x) * factors
        for offset in (0.0, 1.0):
            scaled = copy.deepcopy(norm)
            scale_norm(scaled, factors, offset)
            if torch.allclose(scaled(x), expected, rtol=SINGLE, atol=SINGLE):
                return offset
    return None


@contextmanager
def changed_output(block: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets a module of a block put out what ``change`` makes of its output, inside the context."""

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output)

    handle = block.get_submodule(name).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
