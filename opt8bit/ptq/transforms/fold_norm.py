"""FoldNorm: a norm's scale is multiplied into the layers that read it, where rounding sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import is_linear
from opt8bit.ptq.model.folding import Link
from opt8bit.ptq.transforms.transform import Transform


@dataclass(frozen=True)
class FoldNorm(Transform):
    """Every norm that feeds nothing but linear layers gets a scale of 1, and their columns what it was.

    Rotations ask for it: only a norm without a scale of its own is the same in any basis. Channels whose scale is 0
    keep it.

    Source: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, section 4, stage 1a (https://arxiv.org/abs/2404.00456);
    and, for one-by-one layers, SliceGPT.
    """

    def scale(self, block: nn.Module, link: Link) -> Tensor | None:
        producer = block.get_submodule(link.producer)
        if is_linear(producer):
            return None
        weight: Tensor = link.offset + producer.weight.detach().float()  # type: ignore[operator,union-attr]
        weight = weight if link.negative else weight.abs()
        return torch.where(weight == 0, 1, 1 / torch.where(weight == 0, 1, weight))
