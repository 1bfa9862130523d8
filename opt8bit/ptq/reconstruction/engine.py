"""Trains the weights of a block's layers together, so that the block puts out what the float model's does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.backends import warn
from opt8bit.backends.processor import has_amx
from opt8bit.optim import Adam8bit
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.reconstruction.loss import Example, capped_weights, mixed_inputs, relative_error
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.reconstruction.schedule import HOPELESS, SCHEDULES, is_look
from opt8bit.ptq.reconstruction.trained_block import Best, TrainedBlock
from opt8bit.recipe.arguments import check_count, check_flag, check_fraction, check_one_of, check_positive

HELD_OUT = 8  # one batch of so many tells which parameters are best, and is not learned from
FEWEST = 2  # batches: one to learn from and one to choose by


class Training(NamedTuple):
    """The outcome of the training of a block.

    Attributes:
        before, after: the loss on held-out batches at the start, and with the parameters that were kept.
        step: after which these were there; 0 for the start.
        dropped: steps whose loss or gradient was not finite.
    """

    before: float
    after: float
    step: int
    dropped: int


@dataclass(frozen=True)
class Reconstruction:
    """Says how blocks are trained once their layers are rounded.

    The loss is the mean squared error of the block's output over the tokens that count, relative to the variance of
    what the block adds. The parameters of the least loss on batches that were not learned from are kept, those at the
    start included: there the block is never worse than it was.

    Args:
        parametrization: what is trained.
        steps: of the optimizer, one batch each.
        looks: how often the loss on held-out batches is measured.
        optimizer: called with parameter groups that have ``params`` and ``lr``; the library's Adam with 8-bit states,
            :class:`opt8bit.ptq.reconstruction.sign_sgd.SignSGD`, or any with torch's interface.
        schedule: how learning rates fall to 0: "cosine" or "linear".
        sequences: at most so many are in a batch.
        propagation: how far the block is to make up for what the blocks before it have changed. 1: it is to put out
            what it does in the float model. 0: what the float block makes of the hidden states of the compressed model.
            Between: a mixture of both.
        float_inputs: share of the inputs' elements, chosen randomly at each step, that are the float model's; 0.5 is
            QDrop's. The held-out loss is always that of the compressed model's inputs.
        token_cap: tokens whose hidden states have more than so many times the median norm weigh as if they had so much;
            None for no cap. See :func:`opt8bit.ptq.reconstruction.loss.capped_weights`.
        bfloat16: whether products are those of bfloat16 in training, though not in held-out losses; None for where the
            processor has instructions for tiles of it (AMX).
        seed: of all that is random.

    Raises:
        TypeError: ``parametrization`` is not one, or ``optimizer`` cannot be called.
        ValueError: a number is out of range, or a learning rate of the parametrization not positive.
    """

    parametrization: Parametrization = field(default_factory=TrainScales)
    steps: int = 100
    looks: int = 5
    optimizer: Callable[..., torch.optim.Optimizer] = Adam8bit
    schedule: str = "cosine"
    sequences: int = 2
    propagation: float = 1.0
    float_inputs: float = 0.0
    token_cap: float | None = None
    bfloat16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.parametrization, Parametrization):
            raise TypeError(f"parametrization must be one, such as TrainScales(), got {self.parametrization!r}")
        if not callable(self.optimizer):
            raise TypeError(f"optimizer must be a class such as Adam8bit, got {self.optimizer!r}")
        for name in ("steps", "looks", "sequences"):
            check_count(name, getattr(self, name))
        self._check_rates()
        check_count("seed", self.seed, least=0)
        for name in ("propagation", "float_inputs"):
            check_fraction(name, getattr(self, name))
        if self.token_cap is not None:
            check_positive("token_cap", self.token_cap)
        check_one_of("schedule", self.schedule, SCHEDULES)
        if self.bfloat16 is not None:
            check_flag("bfloat16", self.bfloat16)

    def _check_rates(self) -> None:
        """
        Raises:
            ValueError: a learning rate is not positive.
        """
        kind, rates = type(self.parametrization).__name__, self.parametrization.rates(self.steps)
        lr = getattr(self.parametrization, "lr", None)
        if lr is not None or not rates:
            check_positive(f"{kind}.lr", math.nan if lr is None else lr)
        for name, rate in rates.items():
            check_positive(f"{kind}.rates, {name},", rate)

    def batches(self, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Returns batches of calibration cut into such of at most ``sequences``.

        Raises:
            ValueError: there are too few to learn from some and choose by others.
        """
        parts: list[dict[str, Tensor]] = []
        for batch in batches:
            cut = {name: value.split(self.sequences) for name, value in batch.items()}
            parts += [dict(zip(cut, values, strict=True)) for values in zip(*cut.values(), strict=True)]
        if len(parts) < FEWEST:
            raise ValueError(
                f"reconstruction learns from some batches and chooses by others: it needs {FEWEST} of up to "
                f"{self.sequences} sequences, got {len(parts)}"
            )
        return parts

    @torch.no_grad()
    def examples(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        exact: Sequence[Tensor],
        outputs: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> list[Example]:
        """Returns what a block is trained on.

        Args:
            block: of the float model.
            calls: of the block in the compressed model, one a batch.
            exact: (sequences, length, d), of each batch, the float model's hidden states that go into the block.
            outputs: (sequences, length, d), and what comes out of it.
            masks: (sequences, length), of the tokens that count; None where all do.
        """
        found = []
        for call, own_input, output, mask in zip(calls, exact, outputs, masks, strict=True):
            target = output
            if self.propagation < 1:
                target = torch.lerp(call.of(block), output, self.propagation)
            weights = mask
            if self.token_cap is not None:
                weights = capped_weights(output, mask, self.token_cap)
            found.append(Example(call, target, weights, own_input if self.float_inputs else None))
        return found

    def train(self, block: nn.Module, weights: Mapping[str, TrainedWeight], examples: Sequence[Example]) -> Training:
        """Trains weights in place.

        Args:
            block: with its layers rounded; it stays as it is.
            weights: of its layers, by name.
            examples: what it is to do.

        Returns:
            What became of it.

        Raises:
            ValueError: the loss at the start is not finite, or there are fewer than two examples.

        Warns:
            UserWarning: steps had no finite loss and gradient: they are dropped, and five in a row end the training.
        """
        learned, held_out = _divided(examples)
        trained, generator = TrainedBlock(block, weights), torch.Generator().manual_seed(self.seed)
        optimizer = self._optimizer(weights)
        rates = [group["lr"] for group in optimizer.param_groups]
        best = Best(trained, held_out)
        dropped = in_a_row = 0
        for step, example in enumerate(_drawn(learned, self.steps, generator)):
            progress = step / self.steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * SCHEDULES[self.schedule](progress)
            if self._step(trained, optimizer, example, progress, generator):
                in_a_row = 0
            else:
                dropped, in_a_row = dropped + 1, in_a_row + 1
            if in_a_row == HOPELESS:
                break
            if is_look(step + 1, self.steps, self.looks):
                best.look(step + 1)
        best.restore()
        if dropped:
            end = f", the last {HOPELESS} of them in a row, which ended it" if in_a_row == HOPELESS else ""
            warn(f"{dropped} steps of training {', '.join(weights)} had no finite loss and gradient{end}")
        return Training(best.first, best.loss, best.step, dropped)

    def _optimizer(self, weights: Mapping[str, TrainedWeight]) -> torch.optim.Optimizer:
        """
        Raises:
            ValueError: a rate is that of an attribute which a weight does not have, or there is none for one.
        """
        parametrization = self.parametrization
        rates, kind = parametrization.rates(self.steps), type(parametrization).__name__
        groups: dict[float, list[nn.Parameter]] = {}
        for weight in weights.values():
            named = {name: param for name, param in weight.named_parameters() if param.requires_grad}
            owners = {name.partition(".")[0] for name in named}
            if not rates.keys() <= owners:
                raise ValueError(f"{kind}.rates must name some of {', '.join(sorted(owners))}, got {', '.join(rates)}")
            for name, param in named.items():
                groups.setdefault(rates.get(name.partition(".")[0], parametrization.lr), []).append(param)
        for rate in groups:
            check_positive(f"{kind}.lr", rate)
        return self.optimizer([{"params": params, "lr": rate} for rate, params in groups.items()])

    def _step(
        self,
        trained: TrainedBlock,
        optimizer: torch.optim.Optimizer,
        example: Example,
        progress: float,
        generator: torch.Generator,
    ) -> bool:
        """Makes a step, if its loss and gradients are finite. Returns whether they are."""
        optimizer.zero_grad()
        call = mixed_inputs(example, self.float_inputs, generator)
        lower = has_amx() if self.bfloat16 is None else self.bfloat16
        with torch.enable_grad():
            built = trained.built(progress)
            with torch.autocast(call.hidden.device.type, torch.bfloat16, enabled=lower):
                y = trained.output(call, built)
            loss = relative_error(y, example) + trained.penalty(progress)
            if not bool(loss.isfinite()):
                return False
            loss.backward()
        # A sum is finite where all of them are, and is known without a tensor of so many booleans.
        if not all(math.isfinite(param.grad.sum()) for param in trained.parameters() if param.grad is not None):
            return False
        optimizer.step()
        trained.confine()
        return True


def _divided(examples: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Returns the batches to learn from, and those that tell what is best."""
    if len(examples) < FEWEST:
        raise ValueError(f"there must be at least {FEWEST} examples, got {len(examples)}")
    count = max(1, len(examples) // HELD_OUT)
    return examples[:-count], examples[-count:]


def _drawn(examples: Sequence[Example], steps: int, generator: torch.Generator) -> Iterator[Example]:
    """Yields examples in random order, each once before any comes again."""
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(examples), generator=generator).tolist()
        yield examples[order.pop()]
