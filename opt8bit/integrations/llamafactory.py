"""LLaMA-Factory's v1: opt8bit's optimizers as ``optim_config: {name: opt8bit, optimizer: AdamW}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin  # pyright: ignore[reportMissingImports]
from torch import nn

from opt8bit.integrations.reading import optimizer_named, read
from opt8bit.optim.base import Optimizer8bit


@OptimizerPlugin("opt8bit").register()
def create_optimizer(model: nn.Module, optim_config: Mapping[str, Any]) -> Optimizer8bit:
    """Returns an optimizer over the parameters that are trained.

    Args:
        model: whose parameters they are.
        optim_config: ``optimizer``, a name of :mod:`opt8bit.optim.plain` (AdamW if it is missing), and the optimizer's
            arguments, ``lr`` among them. Strings are read as numbers.

    Raises:
        ValueError: there is no such optimizer.
    """
    config = {option: read(value) for option, value in optim_config.items() if option != "name"}
    kind = optimizer_named(config.pop("optimizer", "AdamW"))
    return kind([param for param in model.parameters() if param.requires_grad], **config)
