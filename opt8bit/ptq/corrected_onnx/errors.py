"""The errors of a quantized model's layers, from runs of both models, and the biases that make up for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from opt8bit.ptq.corrected_onnx.graph import Graph
from opt8bit.ptq.corrected_onnx.matching import OnnxPair
from opt8bit.ptq.corrected_onnx.running import Tensors, Values
from opt8bit.ptq.corrected_onnx.slots import Edit
from opt8bit.ptq.corrected_onnx.units import Units
from opt8bit.ptq.correction.compensation import MAX_BYTES, BiasCompensation
from opt8bit.ptq.naming import named
from opt8bit.ptq.pairs.batches import mask_for, mask_of

ROOM = 2**30  # bytes of layers' outputs that are in memory together
TRIED = 16  # layers that are run together before it is known how large their outputs are
COPIES = 3  # of an output: that of either model, and what goes into the next layer
RELATED = 0.5  # the least cosine of a layer's outputs in both models; that of unrelated ones is 0


class Statistic(NamedTuple):
    """Says which statistic of the errors biases are, as in :class:`BiasCompensation`."""

    name: str
    shrink: bool


@dataclass
class OnnxError:
    """Measures what a layer of a quantized model puts out wrong.

    Attributes:
        pair: the layer in both models.
        compensation: that sees the outputs.
        nbytes: of an output.
    """

    pair: OnnxPair
    compensation: BiasCompensation
    nbytes: int

    def compare(self, y: Tensor, y_hat: Tensor, mask: Tensor | None) -> None:
        """Takes outputs of both models into account.

        Args:
            y, y_hat: of the float model and the quantized one.
            mask: of the batch.

        Raises:
            TypeError, ValueError: an output is not finite, or not of floating-point numbers.
        """
        with named(self.pair.name):
            self.compensation.observe(y, y_hat, mask_for(mask, y, self.pair.channel_axis))

    def edit(self) -> Edit | None:
        """Returns what changes in the quantized file, or None where the samples or the codes allow no change."""
        self.compensation.settle()
        shift = self.compensation.bias.detach().numpy()
        return self.pair.slot.edit(shift) if shift.any() else None


@dataclass
class Tried:
    """Holds what a first batch shows.

    Attributes:
        errors: of layers that can be corrected, with nothing seen yet.
        skipped: layers whose outputs do not fit, with the reason.
        alien: those of them that have nothing to do with the float model's, with their cosine.
    """

    errors: list[OnnxError] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    alien: dict[str, float] = field(default_factory=dict)


def try_layers(
    quantized: Graph, reference: Graph, pairs: Sequence[OnnxPair], batch: Values, statistic: Statistic
) -> Tried:
    """Runs the layers of both models on what goes into the float ones, to see whether they do the same.

    Args:
        quantized, reference: the models.
        pairs: the layers.
        batch: of inputs.
        statistic: of the errors.

    Raises:
        TypeError, ValueError: an output is not finite, or not of floating-point numbers. The message has the name.
    """
    result = Tried()
    for start in range(0, len(pairs), TRIED):
        part = pairs[start : start + TRIED]
        for pair, y, y_hat in LocalOutputs(quantized, reference, part)(batch):
            _try(result, pair, y, y_hat, statistic, mask_of(batch))
    return result


def _try(result: Tried, pair: OnnxPair, y: Tensor, y_hat: Tensor, statistic: Statistic, mask: Tensor | None) -> None:
    if y.shape != y_hat.shape:
        result.skipped[pair.name] = f"its output has shape {tuple(y_hat.shape)}, the reference's {tuple(y.shape)}"
        return
    if not pair.slot.fits(tuple(y.shape), pair.channel_axis):
        result.skipped[pair.name] = "its bias is not one number for each channel"
        return
    likeness = float(torch.cosine_similarity(y.double().flatten(), y_hat.double().flatten(), dim=0))
    if likeness < RELATED and bool(y.any()) and bool(y_hat.any()):
        result.alien[pair.name] = likeness
        result.skipped[pair.name] = (
            f"its outputs have nothing to do with the reference's: their cosine is {likeness:.2f}"
        )
        return
    compensation = BiasCompensation(
        y.shape[pair.channel_axis],
        pair.channel_axis,
        statistic=statistic.name,
        shrink=statistic.shrink,
        max_bytes=MAX_BYTES,
        dtype=torch.float64,
    )
    error = OnnxError(pair, compensation, y.numel() * y.element_size())
    error.compare(y, y_hat, mask)  # to see whether the outputs are finite
    compensation.reset()
    result.errors.append(error)


def local_errors(quantized: Graph, reference: Graph, errors: Sequence[OnnxError], batches: Sequence[Values]) -> None:
    """Runs the float model over all batches; each layer's counterpart sees what the layer sees.

    Where the outputs of all layers take more than :data:`ROOM`, the model is run for some of them after the others.

    Args:
        quantized, reference: the models.
        errors: of the layers; they get what there is to see.
        batches: of the calibration.

    Raises:
        TypeError, ValueError: as of :meth:`OnnxError.compare`.
    """
    for part in in_room(errors):
        outputs = LocalOutputs(quantized, reference, [error.pair for error in part])
        for batch in batches:
            for error, (_, y, y_hat) in zip(part, outputs(batch), strict=True):
                error.compare(y, y_hat, mask_of(batch))


def in_room(errors: Sequence[OnnxError]) -> Iterator[list[OnnxError]]:
    """Divides layers into runs of neighbours whose outputs are in memory together."""
    part: list[OnnxError] = []
    taken = 0
    for error in errors:
        if part and taken + COPIES * error.nbytes > ROOM:
            yield part
            part, taken = [], 0
        part.append(error)
        taken += COPIES * error.nbytes
    if part:
        yield part


class LocalOutputs:
    """Runs layers of both models on what goes into the float ones."""

    def __init__(self, quantized: Graph, reference: Graph, pairs: Sequence[OnnxPair]) -> None:
        self._pairs = pairs
        self._floats = Tensors(reference, {name for pair in pairs for name in (pair.x, pair.y)})
        self._units = Units(quantized, pairs)

    def __call__(self, batch: Values) -> Iterator[tuple[OnnxPair, Tensor, Tensor]]:
        """Yields each layer with its float output and its quantized one."""
        values = self._floats(batch)
        for pair, y_hat in zip(self._pairs, self._units(values), strict=True):
            yield pair, values[pair.y], y_hat
