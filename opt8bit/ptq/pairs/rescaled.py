"""Scales that a quantizer has moved from one layer into the next, as AWQ and SmoothQuant do, moved in the float model.

Such a quantizer leaves what the model computes as it was, and changes what single layers see and put out. Before layers
of the two models can be compared, the float model's scales must lie where the quantized model has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import find_blocks, linear_layers, matrix
from opt8bit.ptq.model.folding import Link, fold
from opt8bit.ptq.model.links import find_links
from opt8bit.ptq.model.passes import ModelError, Refused
from opt8bit.ptq.model.rehearsal import rehearse
from opt8bit.ptq.model.running import Running
from opt8bit.ptq.model.source import InMemory

SAME = 0.01  # of a vector's norm, by which rounding to 16 bits and nothing else may change it
GAIN = 0.75  # what is left, at most, of the difference of weights where scales were moved: rounding stays


class Followed(NamedTuple):
    """Says what was found.

    Attributes:
        producers: names of the norms and layers whose scales lie where the quantized model has them now.
        unknown: names of the blocks whose scales lie elsewhere, nobody knows where.
    """

    producers: list[str]
    unknown: list[str]


def resemblance(layer: nn.Module, other: nn.Module) -> float:
    """Returns the cosine between two layers' weights: 1 for the same, about 0.9 at 2 bits, 0 for unrelated ones."""
    a, b = (matrix(each).to(torch.float32).flatten() for each in (layer, other))
    return float(torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=torch.finfo(torch.float32).tiny))


@torch.no_grad()
def follow_scales(quantized: Running, reference: Running, few: dict[str, Tensor]) -> Followed:
    """Moves scales in the blocks of the float model to where the quantized model has them; it computes the same.

    Blocks whose norms are the same in both models are left as they are. The others stay in memory.

    Args:
        quantized: with the weights that it computes with.
        reference: the float model; its blocks are changed in place.
        few: a batch of few tokens.
    """
    model, model_hat = reference.model, quantized.model
    prefix, blocks = find_blocks(model)
    names = [f"{prefix}.{i}" for i in range(len(blocks))]
    moved = [name for name in names if not _have_same_norms(model_hat, model, name)]
    if not moved:
        return Followed([], [])
    try:
        calls = rehearse(InMemory(model), prefix, blocks, few).calls(model, blocks, few)
    except (Refused, ModelError):  # blocks that cannot be run apart show no links
        return Followed([], moved)
    producers = []
    links: dict[Any, list[Link]] = {}  # of blocks of one structure, found once: the trials take a while
    for name, call in zip(names, calls, strict=True):
        if name in moved:
            reference.hold(name)
            quantized.need(name)
            block_hat, block = model_hat.get_submodule(name), model.get_submodule(name)
            structure = _structure(block)
            if structure not in links:
                links[structure] = find_links(block, call)
            producers += [f"{name}.{own}" for own in _follow(block_hat, block, links[structure])]
    return Followed(producers, [name for name in moved if not _have_same_norms(model_hat, model, name)])


def _structure(block: nn.Module) -> tuple[Any, ...]:
    """Returns the classes of a block's modules, and the shapes of its parameters, by name."""
    modules = ((name, type(module)) for name, module in block.named_modules())
    return (*modules, *((name, param.shape) for name, param in block.named_parameters()))


def _follow(block_hat: nn.Module, block: nn.Module, links: Sequence[Link]) -> list[str]:
    """Moves the scales of one block along its links; returns the names of their producers in it."""
    found = []
    for link in links:
        scale = _scale(block_hat, block, link)
        before = _difference(block_hat, block, link, torch.ones_like(scale))
        if _difference(block_hat, block, link, scale) < GAIN * before:
            fold(block, link, scale)
            found.append(link.producer)
    return found


def _scale(block_hat: nn.Module, block: nn.Module, link: Link) -> Tensor:
    """Returns by how much more the quantized model's producer puts out, (channels,); 1 where that is odd.

    Of a norm the weights say it. Each row of a layer's weight was multiplied by a scale and then rounded: least squares
    tells the scale.
    """
    producer_hat, producer = (each.get_submodule(link.producer) for each in (block_hat, block))
    if producer.weight.dim() == 1:  # type: ignore[union-attr]
        above, below = (link.offset + each.weight.to(torch.float32) for each in (producer_hat, producer))  # type: ignore[operator,union-attr]
    else:
        weight_hat, weight = (matrix(each).to(torch.float32) for each in (producer_hat, producer))
        above, below = (weight_hat * weight).sum(1), weight.square().sum(1)
    scale = above / below
    is_read = torch.isin(torch.arange(len(scale), device=scale.device), link.channels.to(scale.device))
    return torch.where(is_read & scale.isfinite() & (scale > 0), scale, 1)


def _difference(block_hat: nn.Module, block: nn.Module, link: Link, scale: Tensor) -> float:
    """Returns how far the consumers' weights are from the quantized ones, squared, if the link is used.

    Each row may be multiplied by any number: the consumers may be producers of another link.
    """
    total = 0.0
    for name in link.consumers:
        weight_hat, weight = (matrix(each.get_submodule(name)).to(torch.float32) for each in (block_hat, block))
        weight = weight / scale[link.channels]
        factor = (weight_hat * weight).sum(1) / weight.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        total += float((weight_hat - factor[:, None] * weight).square().sum())
    return total


def _have_same_norms(quantized: nn.Module, reference: nn.Module, block: str) -> bool:
    """Tells whether the vectors of a block that are no biases of linear layers are the same in both models."""
    params = dict(quantized.get_submodule(block).named_parameters())
    layers = linear_layers(reference.get_submodule(block))
    for name, param in reference.get_submodule(block).named_parameters():
        other = params.get(name)
        if param.dim() != 1 or name.rpartition(".")[0] in layers or other is None:
            continue
        norm, norm_hat = param.to(torch.float32), other.to(torch.float32)
        if float((norm_hat - norm).norm()) > SAME * float(norm.norm()):
            return False
    return True
