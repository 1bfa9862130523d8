"""Chooses which corrections to keep, by what they do to the model's output on data that was held out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from opt8bit.ptq.correction.placing import Placed
from opt8bit.ptq.model.running import Running
from opt8bit.ptq.pairs.batches import Target, call, mask_of, moved
from opt8bit.ptq.pairs.outputs import Element, element_of

PASSES = 40  # over the held-out data, at most
GROUPS = (PASSES - 2) // 2  # which are tried twice, after all and none
KEPT_BYTES = 2**30  # of the float model's outputs, which are computed again beyond that

Loss = Callable[[Tensor, Tensor], Tensor]


class HeldOut(NamedTuple):
    """Says what was chosen on held-out data.

    Attributes:
        before, after: the loss without any correction, and with those that were kept; never more than before.
        passes: of the quantized model over the data.
        kept, dropped: groups of corrections, each by the names of its modules.
    """

    before: float
    after: float
    passes: int
    kept: list[list[str]]
    dropped: list[list[str]]


def kl_divergence(output_hat: Tensor, output: Tensor) -> Tensor:
    """Returns the divergence of the quantized model's predictions from the float model's, in nats, by row."""
    log_p, log_q = (logits.to(torch.float32).log_softmax(-1) for logits in (output, output_hat))
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def squared_error(output_hat: Tensor, output: Tensor) -> Tensor:
    """Returns the mean squared error of each row."""
    return (output_hat.to(torch.float32) - output.to(torch.float32)).square().mean(-1)


LOSSES: dict[str, Loss] = {"kl": kl_divergence, "mse": squared_error}


def groups_of(names: Sequence[str], most: int = GROUPS) -> list[list[str]]:
    """Divides modules into at most ``most`` groups.

    Modules whose names differ in numbers only are of one kind, such as all ``model.layers.*.mlp.down_proj``. Each kind
    is cut into as many runs of neighbours as the number of groups allows. Where there are too many kinds, neighbours in
    the order of the model go together instead.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    if len(kinds) > most:
        return _runs(list(names), most)
    return [run for kind in kinds.values() for run in _runs(kind, most // len(kinds))]


def _runs(names: list[str], count: int) -> list[list[str]]:
    """Divides names into at most ``count`` runs of nearly the same length."""
    count = min(count, len(names))
    ends = [len(names) * i // count for i in range(count + 1)]
    return [names[a:b] for a, b in itertools.pairwise(ends)]


class Judge:
    """Measures how far the quantized model's output is from the float model's.

    Args:
        quantized, reference: the models.
        batches: that are held out.
        loss: of an output of each, for each row of the last dimension or in all.
        element: of outputs that are no tensors; ``logits`` where there are some.
        target: what batches become for the quantized model; None for what they are.
    """

    def __init__(
        self,
        quantized: Running,
        reference: Running,
        batches: Sequence[Any],
        loss: Loss,
        element: Element,
        target: Target | None,
    ) -> None:
        self.quantized, self.reference, self.batches = quantized, reference, batches
        self.loss, self.element, self.target = loss, element, target
        self.passes = 0
        self._outputs: list[Tensor] = []
        room = KEPT_BYTES
        for output in self._of_reference(batches):
            room -= output.numel() * output.element_size()
            if room < 0:
                break
            self._outputs.append(output)

    def measure(self) -> float:
        """Returns the mean loss over rows that count; infinite where it is not finite."""
        self.passes += 1
        total, rows = 0.0, 0.0
        for batch, output, output_hat in self._outputs_of_both():
            losses = self.loss(output_hat, output.to(output_hat.device))
            mask = mask_of(batch)
            if mask is not None and losses.shape == mask.shape:
                losses = losses[mask.to(losses.device)]
            total += float(losses.sum(dtype=torch.float64))
            rows += losses.numel()
        return total / rows if math.isfinite(total) and rows else math.inf

    def _outputs_of_both(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yields each batch with the outputs of the float model and of the quantized one."""
        kept = len(self._outputs)
        parts: list[tuple[Sequence[Any], Iterable[Tensor]]] = [(self.batches[:kept], self._outputs)]
        if kept < len(self.batches):
            parts.append((self.batches[kept:], self._of_reference(self.batches[kept:])))
        for batches, outputs in parts:
            calls = [partial(call, batch=batch, target=self.target) for batch in batches]
            outputs_hat = map(self._output, self.quantized.outputs(calls))
            yield from zip(batches, outputs, outputs_hat, strict=True)

    def _of_reference(self, batches: Sequence[Any]) -> Iterator[Tensor]:
        return map(self._output, self.reference.outputs([partial(call, batch=batch) for batch in batches]))

    def _output(self, output: Any) -> Tensor:
        has_logits = self.element is None and not isinstance(output, Tensor) and hasattr(output, "logits")
        element = "logits" if has_logits else self.element
        found = element_of(output, element, "the model")
        return found if self.target is None else moved(found, self.target._replace(dtype=None))


def choose(placed: Mapping[str, Placed], judge: Judge) -> HeldOut:
    """Keeps the corrections with which the loss is least; all are in their places when it begins.

    The loss of all and of none is measured first, and the better one is the start. Then each group is put or taken
    away, and stays so where that lowers the loss. That is done twice.

    Returns:
        What was kept. The loss with it is at most that of none.

    Raises:
        ValueError: without corrections, too, the loss is not finite.
    """
    groups = groups_of(list(placed))
    whole = judge.measure()
    _set(placed, groups, [False] * len(groups))
    before = judge.measure()
    if not math.isfinite(before):
        raise ValueError("the loss on the held-out data is not finite without corrections")
    are_kept = [whole <= before] * len(groups)
    _set(placed, groups, are_kept)
    least, last_gain = min(whole, before), 0
    for step in range(2 * len(groups)):
        i = step % len(groups)
        if step - last_gain >= len(groups):  # all others were tried since
            break
        tried = [kept != (i == j) for j, kept in enumerate(are_kept)]
        _set(placed, groups, tried)
        loss = judge.measure()
        if loss < least:
            least, are_kept, last_gain = loss, tried, step
    _set(placed, groups, are_kept)
    kept, dropped = ([g for g, k in zip(groups, are_kept, strict=True) if k == which] for which in (True, False))
    return HeldOut(before, least, judge.passes, kept, dropped)


def _set(placed: Mapping[str, Placed], groups: list[list[str]], are_kept: list[bool]) -> None:
    for group, is_kept in zip(groups, are_kept, strict=True):
        for name in group:
            if is_kept:
                placed[name].put()
            else:
                placed[name].take_away()
