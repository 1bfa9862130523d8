"""Corrects a model that anyone has quantized, by Bias Compensation against the float model that it was made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.correction.compensation import MAX_BYTES
from opt8bit.ptq.correction.placing import Placed
from opt8bit.ptq.model.bias_places import KEYS
from opt8bit.ptq.model.blocks import evaluating
from opt8bit.ptq.model.running import Running, running
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.pairs.batches import as_batches, samples_of, target_of
from opt8bit.ptq.pairs.choice import LOSSES, HeldOut, Judge, choose
from opt8bit.ptq.pairs.layer_error import LayerError, Options
from opt8bit.ptq.pairs.local import about, local_errors
from opt8bit.ptq.pairs.matching import (
    Matches,
    Pair,
    Selectors,
    already_corrected,
    generations,
    match,
    without_unquantized,
)
from opt8bit.ptq.pairs.outputs import Element
from opt8bit.ptq.pairs.sequential import sequential_errors
from opt8bit.recipe.arguments import check_one_of
from opt8bit.recipe.corrections import ORDERS, STATISTICS
from opt8bit.warning import first_of, first_reasons

logger = logging.getLogger(__name__)
UNMATCHED = ("refuse", "skip")
UNIT, UNITS = 16, 16  # images or rows of one mean input at most, and means for which there should be samples
LISTED = 8


@dataclass(frozen=True)
class CorrectedModule:
    """Says what was done to one module.

    Attributes:
        name: of the module.
        place: "bias" for a bias that it had, "new bias", or "BiasCompensation" for a module behind it.
        norm: of the bias that was added.
        is_kept: false where the choice on held-out data has taken it away.
    """

    name: str
    place: str
    norm: float
    is_kept: bool


@dataclass
class Correction:
    """Says what :func:`correct` has done.

    Attributes:
        modules: that have an error which the calibration supports a bias against.
        skipped: modules that were selected and are as they were, with the reason.
        held_out: what was chosen on held-out data; None where none was given.
    """

    modules: list[CorrectedModule]
    skipped: dict[str, str]
    held_out: HeldOut | None
    _placed: list[Placed] = field(repr=False, default_factory=list)

    def undo(self) -> None:
        """Leaves every module as it was before."""
        for placed in self._placed:
            placed.take_away()


def correct(
    quantized: nn.Module | Running,
    reference: nn.Module | Source | Running,
    calibration: Iterable[Any],
    *,
    layers: Selectors = None,
    leave: Selectors = f"*{KEYS}",
    order: str = "local",
    statistic: str = "mean",
    shrink: bool = True,
    held_out: Iterable[Any] | None = None,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "kl",
    unmatched: str = "refuse",
    element: Element = None,
    channel_axis: int = -1,
    max_bytes: int = MAX_BYTES,
) -> Correction:
    """Corrects the outputs of a quantized model's modules by Bias Compensation, in place, without rounding anything.

    Each module gets the bias ``E[y - ŷ]``, y what its namesake in the float model puts out and ŷ its own output. The
    bias goes where the module can hold it: into its own bias, into a new one where its class has a place for that, else
    into a :class:`BiasCompensation` behind it, which is its child ``bias_compensation``.

    Args:
        quantized: a model whose modules have the names of the reference's. Any tool may have made it.
        reference: the float model; or ``ptq.Checkpoint(folder)``, whose blocks are read when they are needed, so that
            both models need not fit into memory. All batches go through it side by side then, and what they need to go
            on with is in memory together. It is left as it is.
        calibration: an iterable of what ``forward`` takes: tensors, tuples of positional arguments, or dictionaries of
            keyword arguments. The first dimension of each tensor counts samples. Padding does not count where a
            dictionary has an ``attention_mask`` (samples, length).
        layers: classes of the reference's modules, or patterns of their names, or several. ``""`` is the model itself.
            By default all linear layers and convolutions.
        leave: those of them that are left as they are. By default key projections, in whose bias rotary embeddings
            do harm.
        order: "local": each module sees what its namesake sees in the float model. Where a module is affine in its
            input, its mean input says the mean error, so that this takes little beside a pass of a large model.
            "sequential": each sees what the corrected modules before it make of the batches, in one pass of each model.
            What all batches need to go on is in memory together then.
        statistic: "mean" (least squared error) or "median" (least absolute error).
        shrink: whether biases are shrunk to what the samples support. A single sample supports none.
        held_out: batches that the calibration has not. With them, groups of corrections are kept only where the loss on
            them falls: see :func:`choose`. It takes at most 40 passes over them.
        loss: on held-out data: "kl" for logits in the last dimension, "mse", or a function of the quantized model's
            output and the float model's, which returns a tensor that is averaged.
        unmatched: what is done where a selected module has no counterpart of its shape: "refuse" or "skip".
        element: index, key or attribute of the tensor in outputs that are no tensors.
        channel_axis: of modules that are neither linear layers nor convolutions, counted from the back.
        max_bytes: of errors that a median keeps for each module; see :class:`BiasCompensation`.

    Returns:
        What was done, and how to undo it.

    Raises:
        TypeError, ValueError: an argument is not one of the above; modules do not match, which are listed; there is a
            correction already; or an output is not finite, with the module's name. The model is as it was then.
        ImportError: ``order`` is "sequential", or the reference a checkpoint, and greenlet is not installed.

    Example:
        >>> correction = correct(quantized, model, batches, held_out=others)  # doctest: +SKIP

    Source: Minimize Quantization Output Error with Bias Compensation, https://arxiv.org/abs/2404.01892.
    """
    _check(quantized, reference, order, statistic, unmatched, loss, channel_axis)
    quantized, reference = running(quantized), running(reference)
    model, model_hat = reference.model, quantized.model
    batches = as_batches("calibration", calibration)
    others = None if held_out is None else as_batches("held_out", held_out)
    matches = match(model_hat, model, layers, leave, channel_axis)
    if unmatched == "refuse" and matches.unmatched:
        raise _unmatched(matches.unmatched)
    if not matches.pairs:
        raise ValueError(f"no module is left to correct: {first_reasons(matches.skipped | matches.unmatched, LISTED)}")
    if order == "local":
        matches = without_unquantized(matches, quantized, reference)
    target = target_of(model_hat, model)
    unit = max(1, min(UNIT, sum(map(samples_of, batches)) // UNITS))
    options = Options(statistic, shrink, max_bytes, element, target, unit)
    run = _Run(quantized, reference, batches, options, unmatched == "skip")
    with evaluating(model_hat, model):
        try:
            run.correct(matches, order)
            chosen = None
            if others is not None and run.placed:
                logger.info("choosing among %d corrections on held-out data", len(run.placed))
                measure = LOSSES[loss] if isinstance(loss, str) else loss
                chosen = choose(run.placed, Judge(quantized, reference, others, measure, element, target))
        except BaseException:
            run.undo()
            raise
    return run.report(matches, chosen)


class _Run:
    """Corrects a model, and leaves it as it was if something fails."""

    def __init__(
        self, quantized: Running, reference: Running, batches: list[Any], options: Options, skips: bool
    ) -> None:
        self.quantized, self.reference, self.batches = quantized, reference, batches
        self.options, self.skips = options, skips
        self.errors: dict[str, LayerError] = {}
        self.placed: dict[str, Placed] = {}
        self.unmatched: dict[str, str] = {}

    def correct(self, matches: Matches, order: str) -> None:
        """Puts all corrections into their places."""
        if order == "sequential":
            self._correct(matches.pairs, is_sequential=True)
            return
        for pairs in generations(matches.pairs):
            self._correct(pairs, is_sequential=False)

    def _correct(self, pairs: list[Pair], is_sequential: bool) -> None:
        logger.info("comparing %d modules on %d batches", len(pairs), len(self.batches))
        errors = [LayerError(pair, self.options) for pair in pairs]
        if is_sequential:
            models = self.quantized.model, self.reference.model
            found = sequential_errors(*models, errors, self.batches, self.options.target)
        else:
            found = local_errors(self.reference, errors, self.batches)
        if found and not self.skips:
            raise _unmatched(found)
        self.unmatched |= found
        for error in errors:
            with about(error):
                error.settle()
            self.errors[error.pair.name] = error
            placed = error.placed()
            if placed is not None:
                self.placed[error.pair.name] = placed
                placed.put()

    def undo(self) -> None:
        for placed in self.placed.values():
            placed.take_away()

    def report(self, matches: Matches, chosen: HeldOut | None) -> Correction:
        """Says what was done."""
        dropped = {name for group in (chosen.dropped if chosen else []) for name in group}
        skipped = matches.skipped | matches.unmatched | self.unmatched
        modules = []
        for name, error in self.errors.items():
            if name in self.placed:
                assert error.compensation is not None
                norm = float(error.compensation.bias.norm())
                modules.append(CorrectedModule(name, self.placed[name].words, norm, name not in dropped))
            elif name not in skipped:
                skipped[name] = _why_uncorrected(error)
        kept = [placed for name, placed in self.placed.items() if name not in dropped]
        return Correction(modules, skipped, chosen, kept)


def _why_uncorrected(error: LayerError) -> str:
    if error.compensation is None:
        return "it is never called"
    return "the samples support no bias: there is no error, or it is not the same in all samples"


def _check(
    quantized: nn.Module | Running,
    reference: nn.Module | Source | Running,
    order: str,
    statistic: str,
    unmatched: str,
    loss: str | Callable[..., Any],
    channel_axis: int,
) -> None:
    for name, model in (("quantized", quantized), ("reference", reference)):
        if not isinstance(model, nn.Module | Running) and not (name == "reference" and isinstance(model, Source)):
            raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.Module) and any(param.is_meta for param in model.parameters()):
            raise ValueError(f"{name} must be in memory, got parameters on the meta device")
    if quantized is reference:
        raise ValueError("quantized and reference must be two models, got the same one")
    check_words(order, statistic, loss)
    check_one_of("unmatched", unmatched, UNMATCHED)
    if channel_axis >= 0:
        raise ValueError(f"channel_axis must be negative, counted from the back, got {channel_axis}")
    corrected = already_corrected(quantized.model if isinstance(quantized, Running) else quantized)
    if corrected:
        names = first_of(corrected, LISTED)
        raise ValueError(f"quantized is corrected already: a BiasCompensation stands behind {names}")


def check_words(order: str, statistic: str, loss: str | Callable[..., Any] | None) -> None:
    """
    Raises:
        ValueError: an argument of a correction is none of the words that it can be.
    """
    check_one_of("order", order, ORDERS)
    check_one_of("statistic", statistic, STATISTICS)
    if loss is not None and not callable(loss):
        check_one_of("loss", loss, LOSSES)


def _unmatched(found: Mapping[str, str]) -> ValueError:
    return ValueError(f"modules do not match, and are left out with unmatched='skip': {first_reasons(found, LISTED)}")
