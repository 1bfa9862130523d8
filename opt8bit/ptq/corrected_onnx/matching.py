"""Finds the layers of a float model in the quantized one, whatever that has done to their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from opt8bit.ptq.corrected_onnx.graph import Graph, Node, has_subgraph
from opt8bit.ptq.corrected_onnx.layers import ACTIVATIONS, FloatLayer, float_layers
from opt8bit.ptq.corrected_onnx.slots import Slot, find_slot

# That onnxruntime's quantizers put behind the name of a node.
SUFFIXES = ("", "_Q4", "_matmul_Q4", "_quant", "_MatMul_quant")


class OnnxPair(NamedTuple):
    """A layer in both models.

    Attributes:
        name: of the layer.
        x, x_hat: the tensor that goes into it, in the float model and in the quantized one.
        y, y_hat: what comes out, before an activation and before it is quantized.
        channel_axis: of the outputs.
        slot: where a bias goes.
    """

    name: str
    x: str
    x_hat: str
    y: str
    y_hat: str
    channel_axis: int
    slot: Slot


class OnnxMatches(NamedTuple):
    """Lists what can be corrected, and what cannot, with the reason."""

    pairs: list[OnnxPair]
    skipped: dict[str, str]


def match_onnx(quantized: Graph, reference: Graph, leave: Sequence[str]) -> OnnxMatches:
    """Pairs the layers of two models: by the names of their outputs, else by those of their nodes.

    Args:
        quantized, reference: the models.
        leave: patterns of names of layers that are left as they are.
    """
    result = OnnxMatches([], {})
    taken: set[str] = set()
    for layer in float_layers(reference):
        if layer.is_among(tuple(leave)):
            result.skipped[layer.name] = "it is among those to leave"
            continue
        pair = _pair(quantized, reference, layer)
        if not isinstance(pair, str) and pair.y_hat in taken:
            pair = f"{pair.y_hat} in the quantized file is another layer's output"
        if isinstance(pair, str):
            result.skipped[layer.name] = pair
        else:
            result.pairs.append(pair)
            taken.add(pair.y_hat)
    return result


def _pair(quantized: Graph, reference: Graph, layer: FloatLayer) -> OnnxPair | str:
    """Returns a layer and its counterpart; or why there is none to correct."""
    reasons = []
    for y, y_hat in _candidates(quantized, layer):
        slot = find_slot(quantized, y_hat)
        if isinstance(slot, str):
            reasons.append(slot)
            continue
        x_hat = _counterpart(quantized, reference, layer.x)
        if x_hat is None:
            return f"{layer.x}, which goes into it, is no tensor of the quantized file"
        inputs = {each.name for each in quantized.inputs} - {x_hat}
        nodes, leaves = quantized.behind([y_hat], [x_hat])
        if x_hat not in leaves or leaves & inputs:
            return f"its output in the quantized file does not come from {x_hat} only"
        if any(map(has_subgraph, nodes)):
            return "it has branches or loops in it"
        return OnnxPair(layer.name, layer.x, x_hat, y, y_hat, layer.channel_axis, slot)
    return reasons[-1] if reasons else "the quantized file has no tensor and no node of its names"


def _candidates(quantized: Graph, layer: FloatLayer) -> list[tuple[str, str]]:
    """Returns the outputs of a layer that have a counterpart, with that, from the last output to the first."""
    found = [(output, _before_codes(quantized, output)) for output in reversed(layer.outputs)]
    if layer.ahead is not None:
        ahead = _before_codes(quantized, layer.ahead)
        if ahead in quantized.producers and quantized.producers[ahead].op_type not in ACTIVATIONS:
            found.insert(0, (layer.outputs[-1], ahead))
    found = [(output, name) for output, name in found if name in quantized.producers]
    if found:
        return found
    nodes = [(output, _renamed(quantized, name)) for output, name in zip(layer.outputs, layer.nodes, strict=True)]
    return [(output, _before_codes(quantized, node.output[0])) for output, node in reversed(nodes) if node is not None]


def _renamed(quantized: Graph, name: str) -> Node | None:
    found = (quantized.named(f"{name}{suffix}") for suffix in SUFFIXES if name)
    return next((node for node in found if node is not None), None)


def _before_codes(quantized: Graph, name: str) -> str:
    """Returns what a tensor is before it is quantized and dequantized, or cast; itself where it is neither."""
    source = quantized.producers.get(name)
    while source is not None and source.op_type == "Cast" and source.input[0] in quantized.producers:
        name = source.input[0]
        source = quantized.producers[name]
    if source is None or source.op_type != "DequantizeLinear":
        return name
    codes = quantized.producers.get(source.input[0])
    if codes is None:
        return name
    return codes.input[0] if codes.op_type == "QuantizeLinear" else source.input[0]


def _counterpart(quantized: Graph, reference: Graph, name: str) -> str | None:
    """Returns the tensor of the quantized model that is a tensor of the float one."""
    if name in quantized.producers or any(each.name == name for each in quantized.inputs):
        return name
    node = reference.producers.get(name)
    other = None if node is None else _renamed(quantized, node.name)
    if node is None or other is None or len(other.output) != len(node.output):
        return None
    return other.output[list(node.output).index(name)]
