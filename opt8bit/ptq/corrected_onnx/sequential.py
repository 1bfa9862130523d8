"""Errors of layers that see what the corrected layers before them have made of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opt8bit.ptq.corrected_onnx.editing import edited
from opt8bit.ptq.corrected_onnx.errors import OnnxError, in_room
from opt8bit.ptq.corrected_onnx.graph import Graph, read_by
from opt8bit.ptq.corrected_onnx.running import Tensors, Values
from opt8bit.ptq.corrected_onnx.slots import Edit
from opt8bit.ptq.pairs.batches import mask_of


def sequential_errors(
    quantized: Graph, reference: Graph, errors: Sequence[OnnxError], batches: Sequence[Values]
) -> dict[str, Edit]:
    """Runs both models over all batches as far as to the layers that have all others before them corrected.

    Layers that do not depend on each other are corrected together. So the models are run once for each depth, from
    their inputs to there.

    Args:
        quantized, reference: the models.
        errors: of the layers; they get what there is to see.
        batches: of the calibration.

    Returns:
        What changes in the quantized file, by layer.

    Raises:
        TypeError, ValueError: as of :meth:`OnnxError.compare`.
    """
    edits: dict[str, Edit] = {}
    for generation in _by_depth(quantized, errors):
        corrected = Graph(edited(quantized.model, edits.values()), quantized.folder)
        for part in in_room(generation):
            floats = Tensors(reference, {error.pair.y for error in part})
            others = Tensors(corrected, {error.pair.y_hat for error in part})
            for batch in batches:
                values, values_hat = floats(batch), others(batch)
                for error in part:
                    error.compare(values[error.pair.y], values_hat[error.pair.y_hat], mask_of(batch))
        for error in generation:
            edit = error.edit()
            if edit is not None:
                edits[error.pair.name] = edit
    return edits


def _by_depth(graph: Graph, errors: Sequence[OnnxError]) -> list[list[OnnxError]]:
    """Divides layers by how many others lie one behind another before them."""
    outputs = {error.pair.y_hat: error for error in errors}
    depths: dict[str, int] = {}  # of tensors
    result: Mapping[int, list[OnnxError]] = {}
    for node in graph.model.graph.node:
        before = max((depths.get(name, 0) for name in read_by(node)), default=0)
        for name in node.output:
            depths[name] = before
            if name in outputs:
                result.setdefault(before, []).append(outputs[name])
                depths[name] = before + 1
    return [result[depth] for depth in sorted(result)]
