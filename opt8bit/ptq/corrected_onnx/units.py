"""Takes the layers of a quantized model apart, so that each can be run on what goes into the float one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from opt8bit.ptq.corrected_onnx.graph import Graph, Model, Node
from opt8bit.ptq.corrected_onnx.library import onnx
from opt8bit.ptq.corrected_onnx.matching import OnnxPair
from opt8bit.ptq.corrected_onnx.running import Session, Values

TYPED_BY = {"QuantizeLinear": 1, "MatMulNBits": 2}  # the input that tells the type of the first one


class Units:
    """The layers of a quantized model side by side, with all that quantizes and dequantizes for each of them.

    Args:
        graph: of the quantized model.
        pairs: the layers.
    """

    def __init__(self, graph: Graph, pairs: Sequence[OnnxPair]) -> None:
        self._outputs = [_within(pair, pair.y_hat) for pair in pairs]
        self._inputs = {_input(pair): pair.x for pair in pairs}
        self._session = Session(_side_by_side(graph, pairs), graph.folder)

    def __call__(self, values: Values) -> list[Tensor]:
        """Returns the layers' outputs.

        Args:
            values: by name, among them what goes into the float layers.
        """
        found = self._session({name: values[x] for name, x in self._inputs.items()}, self._outputs)
        return [found[name] for name in self._outputs]


def _side_by_side(graph: Graph, pairs: Sequence[OnnxPair]) -> Model:
    """Returns a model of the layers. Each has copies of its nodes; initializers are shared."""
    nodes: list[Node] = []
    leaves: set[str] = set()
    inputs: dict[str, int] = {}
    for pair in pairs:
        behind = graph.behind([pair.y_hat], [pair.x_hat])
        constants = behind.leaves - {pair.x_hat}
        leaves |= constants
        nodes += [_copied(node, pair, constants) for node in behind.nodes]
        inputs.setdefault(_input(pair), _type(graph, behind.nodes, pair.x_hat))
    result = graph.part_of(nodes, leaves, [_within(pair, pair.y_hat) for pair in pairs])
    helper = onnx().helper
    result.graph.input.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items())
    return result


def _input(pair: OnnxPair) -> str:
    """Returns the name of a float layer's input as its counterpart's; layers that read the same have one."""
    return f"into/{pair.x}"


def _within(pair: OnnxPair, name: str) -> str:
    return f"{pair.name}/{name}"


def _copied(node: Node, pair: OnnxPair, constants: Collection[str]) -> Node:
    """Returns a copy of a node whose tensors belong to one layer."""
    result = onnx().NodeProto()
    result.CopyFrom(node)
    result.name = _within(pair, node.name)
    for i, name in enumerate(node.input):
        if name == pair.x_hat:
            result.input[i] = _input(pair)
        elif name and name not in constants:
            result.input[i] = _within(pair, name)
    for i, name in enumerate(node.output):
        result.output[i] = _within(pair, name) if name else ""
    return result


def _type(graph: Graph, nodes: Sequence[Node], x_hat: str) -> int:
    """Returns the ONNX type of what goes into a layer."""
    reader = next(node for node in nodes if x_hat in node.input)
    constants = [name for name in reader.input if name in graph.constants]
    index = TYPED_BY.get(reader.op_type)
    name = reader.input[index] if index is not None else constants[0] if constants else ""
    return graph.float_type(name)
