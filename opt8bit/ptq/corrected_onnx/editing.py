"""A model with other biases: what no correction changes is there as it was."""

from __future__ import annotations

from collections.abc import Iterable

from opt8bit.ptq.corrected_onnx.graph import Model
from opt8bit.ptq.corrected_onnx.library import onnx
from opt8bit.ptq.corrected_onnx.slots import Edit


def edited(model: Model, edits: Iterable[Edit]) -> Model:
    """Returns a copy of a model with corrections in it.

    Args:
        model: as it was read.
        edits: of the corrections. No two of them change the same.
    """
    result = onnx().ModelProto()
    result.CopyFrom(model)
    edits = list(edits)
    tensors = {name: tensor for edit in edits for name, tensor in edit.initializers.items()}
    nodes = {output: node for edit in edits for output, node in edit.nodes.items()}
    for initializer in result.graph.initializer:
        if initializer.name in tensors:
            initializer.CopyFrom(tensors.pop(initializer.name))
    result.graph.initializer.extend(tensors.values())  # those that are new
    for node in result.graph.node:
        if node.output and node.output[0] in nodes:
            node.CopyFrom(nodes[node.output[0]])
    for edit in edits:
        for node in edit.added:
            result.graph.node.insert(0, node)  # in front of what reads it
    return result
