"""transformers' Trainer: a factory for ``optimizer_cls_and_kwargs``, and a callback that logs how exact states are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opt8bit.integrations.reading import optimizer_named, read, read_options
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.error import state_error
from opt8bit.optim.plain import Muon, MuonAdamW


def optimizer_cls_and_kwargs(
    name: str, arguments: TrainingArguments, **options: Any
) -> tuple[type[Optimizer8bit], dict[str, Any]]:
    """Returns what ``Trainer(optimizer_cls_and_kwargs=...)`` takes, for an optimizer by its name.

    The learning rate, betas and epsilon are those of the training arguments, where the optimizer has them. Weight decay
    is in the groups that the Trainer makes.

    Args:
        name: ``"AdamW"``, ``"Lion"`` ...: of :mod:`opt8bit.optim.plain`, in any case, except Muon and MuonAdamW: the
            Trainer's groups hold vectors, too, and have no names.
        arguments: whose ``optim_args`` may have further options, as ``"block_size=128,stochastic_rounding=true"``.
        options: of the optimizer; they go before those of ``arguments``. Strings are read as numbers.

    Raises:
        ValueError: there is no such optimizer, the Trainer's groups are not for it, or ``optim_args`` cannot be read.

    Example::

        chosen = optimizer_cls_and_kwargs("AdamW", arguments, stochastic_rounding=True)
        trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=chosen)
    """
    kind = optimizer_named(name)
    if kind in (Muon, MuonAdamW):
        raise ValueError(
            f"{kind.__name__} cannot be had so: the Trainer's groups hold vectors, too, and have no names to choose "
            "matrices by. Give Trainer(optimizers=(MuonAdamW(model), None)) instead"
        )
    taken = signature(kind).parameters
    kwargs: dict[str, Any] = {"lr": arguments.learning_rate}
    if "betas" in taken:
        further = taken["betas"].default[2:]
        kwargs["betas"] = (arguments.adam_beta1, arguments.adam_beta2, *further)
    if "eps" in taken:
        kwargs["eps"] = arguments.adam_epsilon
    kwargs |= read_options(arguments.optim_args or "")
    return kind, kwargs | {option: read(value) for option, value in options.items()}


class StateErrorCallback(TrainerCallback):
    """Logs what coding costs the states in a step, and how many bytes all states take, on every step that is logged.

    ``state_error/exp_avg`` is the mean over parameters of ``norm(stored - exact) / norm(exact)`` of that state, as
    :func:`opt8bit.state_error` measures it with the gradients of the step; ``state_error/exp_avg_max`` is the largest.
    ``state_bytes`` counts the tensors in ``optimizer.state`` on this process. The first step has no states to measure.

    Args:
        log: takes figures by name; ``trainer.log`` puts them where the Trainer's go.
        every: steps between two measurements; the Trainer's ``logging_steps`` if None. One costs about a step in plain
            torch.

    Example::

        trainer.add_callback(StateErrorCallback(trainer.log))
    """

    def __init__(self, log: Callable[[dict[str, float]], Any], every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be a positive number of steps, got {every!r}")
        self._log, self._every = log, every
        self._figures: dict[str, float] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures before the step, while its gradients are there."""
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's is around it
        if not isinstance(optimizer, Optimizer8bit):
            raise TypeError(f"StateErrorCallback measures optimizers of opt8bit, got {type(optimizer).__name__}")
        if (state.global_step + 1) % (self._every or state.logging_steps) == 0:
            self._figures = figures_of(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs what was measured, with the number of the step."""
        if self._figures:
            self._log(self._figures)
            self._figures = {}


def figures_of(optimizer: Optimizer8bit) -> dict[str, float]:
    """Returns the figures that :class:`StateErrorCallback` logs; none before the first step."""
    if not optimizer.state:
        return {}
    errors: dict[str, list[float]] = defaultdict(list)
    for row in state_error(optimizer).rows:
        errors[row.state].append(row.relative)
    figures: dict[str, float] = {}
    for name, values in errors.items():
        figures[f"state_error/{name}"] = math.fsum(values) / len(values)
        figures[f"state_error/{name}_max"] = max(values)
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    figures["state_bytes"] = sum(tensor.nbytes for tensor in tensors)
    return figures
