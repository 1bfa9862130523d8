"""timm's registry: opt8bit's optimizers as ``--opt opt8bitadamw``, ``opt8bitlion`` and so on."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

from timm.optim import OptimInfo, OptimizerRegistry  # pyright: ignore[reportMissingImports]
from timm.optim._optim_factory import default_registry  # pyright: ignore[reportMissingImports]

from opt8bit.integrations.reading import read
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.plain import PLAIN, AdamWScheduleFree, MuonAdamW

# The first chooses by names, which timm does not hand on; the second is to be told when the model is evaluated.
LEFT_OUT = (MuonAdamW, AdamWScheduleFree)


def register(registry: OptimizerRegistry = default_registry) -> list[str]:
    """Registers every optimizer that takes parameters of any shape, as ``opt8bit`` and its name in lower case.

    Numbers that arrive as strings, as ``--opt-kwargs`` may have them, are read.

    Args:
        registry: timm's own, unless another is given.

    Returns:
        The names that ``create_optimizer_v2(opt=...)`` then knows.

    Example::

        register()
        optimizer = timm.optim.create_optimizer_v2(model, opt="opt8bitadamw", lr=1e-3, weight_decay=0.05)
    """
    kinds = [kind for kind in PLAIN if kind not in LEFT_OUT and all(rule.dim is None for rule in kind.rules)]
    infos = [info_of(kind) for kind in kinds]
    for info in infos:
        if info.name not in registry.list_optimizers():
            registry.register(info)
    return [info.name for info in infos]


def info_of(kind: type[Optimizer8bit]) -> OptimInfo:
    """Returns what timm wants to know of an optimizer; timm drops the arguments that it does not have."""
    arguments = signature(kind).parameters
    has_betas = "betas" in arguments
    return OptimInfo(
        name=f"opt8bit{kind.__name__.lower()}",
        opt_class=partial(made, kind),
        description=f"{kind.__name__} of opt8bit, with 8-bit states",
        has_eps="eps" in arguments,
        has_momentum="momentum" in arguments,
        has_betas=has_betas,
        num_betas=len(arguments["betas"].default) if has_betas else 2,
    )


def made(kind: type[Optimizer8bit], params: Any, **arguments: Any) -> Optimizer8bit:
    """Returns an optimizer whose arguments may be strings."""
    return kind(params, **{name: read(value) for name, value in arguments.items()})
