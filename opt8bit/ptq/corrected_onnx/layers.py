"""Finds the linear layers of a float model, whatever tool has exported it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from opt8bit.ptq.corrected_onnx.graph import Graph, Node

CONVOLUTIONS, PRODUCTS = ("Conv", "ConvTranspose"), ("Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")  # that quantizers leave out where the output's codes begin or end there


@dataclass(frozen=True)
class FloatLayer:
    """A convolution or a product with a constant matrix, and the constants that are added to its output.

    Attributes:
        name: of its node; that of its output where the node has none, or where others have the same.
        words: names by which a pattern may mean it: of its nodes, of its output and of its weight.
        x: the tensor that goes in.
        outputs: that it has, from the first to the last: of its node, with the bias that an Add adds, and normalized.
        nodes: names of the nodes that put these out.
        ahead: what an activation makes of the last output; None where none follows. A quantizer that leaves the
            activation out gives this name to the last output.
        channel_axis: of its outputs.
    """

    name: str
    words: tuple[str, ...]
    x: str
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    ahead: str | None
    channel_axis: int

    def is_among(self, patterns: tuple[str, ...]) -> bool:
        """Tells whether a pattern means it."""
        return any(fnmatchcase(word, pattern) for word in self.words for pattern in patterns)


def float_layers(graph: Graph) -> list[FloatLayer]:
    """Returns the layers of a float model in the order of its nodes."""
    found: list[FloatLayer] = []
    names: set[str] = set()
    for node in graph.model.graph.node:
        layer = _layer(graph, node, names)
        if layer is not None:
            found.append(layer)
            names.add(layer.name)
    return found


def _layer(graph: Graph, node: Node, taken: set[str]) -> FloatLayer | None:
    x = _input(graph, node)
    if x is None:
        return None
    chain = [node, *_constants_behind(graph, node)]
    outputs = tuple(each.output[0] for each in chain)
    weights = graph.behind(name for name in node.input if name in graph.constants).leaves
    nodes = tuple(each.name for each in chain)
    return FloatLayer(
        name=node.name if graph.named(node.name) is not None and node.name not in taken else outputs[0],
        words=tuple(filter(None, (*nodes, *outputs, *sorted(weights)))),
        x=x,
        outputs=outputs,
        nodes=nodes,
        ahead=_activated(graph, outputs[-1]),
        channel_axis=1 if node.op_type in CONVOLUTIONS else -1,
    )


def _input(graph: Graph, node: Node) -> str | None:
    """Returns the tensor that goes into a layer, or None where the node is none."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in (*CONVOLUTIONS, *PRODUCTS):
        return None
    x, weight = node.input[:2]
    return x if x not in graph.constants and weight in graph.constants else None


def _constants_behind(graph: Graph, node: Node) -> Iterator[Node]:
    """Yields the nodes behind a layer that add constants to its output or scale it, one after another."""
    while graph.is_private(node.output[0]):
        (after,) = graph.consumers[node.output[0]]
        adds = after.op_type == "Add" and any(name in graph.constants for name in after.input)
        normalizes = after.op_type == "BatchNormalization" and after.input[0] == node.output[0]
        if not (adds or normalizes):
            return
        yield after
        node = after


def _activated(graph: Graph, output: str) -> str | None:
    """Returns what an activation makes of an output, or None where none follows, or more follows than that."""
    if not graph.is_private(output):
        return None
    (after,) = graph.consumers[output]
    return after.output[0] if after.op_type in ACTIVATIONS and after.input[0] == output else None
