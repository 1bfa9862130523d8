"""Finds where a node of a quantized model takes a bias, and what changes in the file when that is raised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opt8bit.ptq.corrected_onnx.graph import Graph, Initializer, Node, attribute
from opt8bit.ptq.corrected_onnx.library import onnx

CODES = (np.int8, np.uint8, np.int16, np.uint16, np.int32)  # that a bias may be stored in
BIAS_INPUTS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "MatMulNBits": 5}
SCALES = {"MatMulNBits": 2}  # the input whose numbers are of the output's type; that of the weight elsewhere
INTEGERS = ("Conv", "Gemm")  # that onnxruntime computes in integers where the bias is coded, too


@dataclass(frozen=True)
class Edit:
    """Says what a correction changes in a graph.

    Attributes:
        words: say what the place is.
        initializers: that are new or others, by name.
        nodes: that are others, by the name of their first output.
        added: nodes that read nothing but initializers.
    """

    words: str
    initializers: dict[str, Initializer]
    nodes: dict[str, Node] = field(default_factory=dict)
    added: tuple[Node, ...] = ()


class Slot(ABC):
    """The input of a node that is added to its output, channel by channel."""

    @abstractmethod
    def fits(self, shape: tuple[int, ...], channel_axis: int) -> bool:
        """Tells whether it has one number for each channel of an output of a shape."""

    @abstractmethod
    def edit(self, shift: np.ndarray) -> Edit | None:
        """Returns what raises the output by a shift (channels,), float64, or None where no stored number changes."""


@dataclass(frozen=True)
class StoredBias(Slot):
    """A bias that is an initializer.

    Attributes:
        graph: that it is in.
        name: of the initializer.
        reader: the node that reads it, and the number of its input.
        shape: in which it is added to the output.
        own: whether it is the bias of a convolution, which has one dimension.
        factor: by which the node multiplies it.
    """

    graph: Graph
    name: str
    reader: tuple[Node, int]
    shape: tuple[int, ...]
    own: bool
    factor: float = 1.0

    def fits(self, shape: tuple[int, ...], channel_axis: int) -> bool:
        return _fits(self.shape, shape, channel_axis, self.own)

    def edit(self, shift: np.ndarray) -> Edit | None:
        had = self.graph.values(self.name)
        bias = (had.astype(np.float64) + (shift / self.factor).reshape(had.shape)).astype(had.dtype)
        return _replaced(self.graph, self.name, self.reader, had, bias)


@dataclass(frozen=True)
class CodedBias(Slot):
    """A bias that a DequantizeLinear makes of codes. It is raised to the nearest value that codes can have.

    Attributes:
        graph: that it is in.
        node: the DequantizeLinear.
        own: whether it is the bias of a convolution.
    """

    graph: Graph
    node: Node
    own: bool

    def fits(self, shape: tuple[int, ...], channel_axis: int) -> bool:
        return _fits(tuple(self.graph.initializers[self.node.input[0]].dims), shape, channel_axis, self.own)

    def edit(self, shift: np.ndarray) -> Edit | None:
        had, scale = (self.graph.values(name) for name in self.node.input[:2])
        codes = had.astype(np.float64).ravel() + shift / scale.astype(np.float64).ravel()
        limits = np.iinfo(had.dtype)
        new = np.clip(np.rint(codes), limits.min, limits.max).astype(had.dtype).reshape(had.shape)
        return _replaced(self.graph, self.node.input[0], (self.node, 0), had, new)


@dataclass(frozen=True)
class EmptySlot(Slot):
    """An optional input that is not given.

    Attributes:
        graph: that the node is in.
        node: that would read a bias.
        index: of the input.
        factor: by which the node would multiply it.
    """

    graph: Graph
    node: Node
    index: int
    factor: float = 1.0

    def fits(self, shape: tuple[int, ...], channel_axis: int) -> bool:
        return True

    def edit(self, shift: np.ndarray) -> Edit | None:
        name = self.graph.fresh(f"{self.node.output[0]}_bias")
        bias, helper = shift / self.factor, onnx().helper
        scale = self._scale(len(shift))
        if scale is None:
            kind = self.graph.float_type(self.node.input[SCALES.get(self.node.op_type, 1)])
            tensor = onnx().numpy_helper.from_array(bias.astype(helper.tensor_dtype_to_np_dtype(kind)), name)
            return Edit("new bias", {name: tensor}, self._reading(name)) if bias.any() else None
        # As onnxruntime's quantizer has it, so that onnxruntime goes on computing the layer in integers.
        limits = np.iinfo(np.int32)
        codes = np.clip(np.rint(bias / scale.astype(np.float64)), limits.min, limits.max).astype(np.int32)
        parts = {f"{name}_quantized": codes, f"{name}_quantized_scale": scale}
        axis = {"axis": 0} if scale.ndim else {}
        node = helper.make_node("DequantizeLinear", list(parts), [name], f"{name}_DequantizeLinear", **axis)
        tensors = {key: onnx().numpy_helper.from_array(value, key) for key, value in parts.items()}
        return Edit("new bias", tensors, self._reading(name), (node,)) if codes.any() else None

    def _reading(self, name: str) -> dict[str, Node]:
        return {self.node.output[0]: _with_input(self.node, self.index, name)}

    def _scale(self, channels: int) -> np.ndarray | None:
        """Returns the scale of the products that the node sums, or None where an input is not dequantized."""
        factors = self.node.input[:2]
        if self.node.op_type not in INTEGERS or not all(_is_dequantized(self.graph, name) for name in factors):
            return None
        names = [self.graph.producers[name].input[1] for name in factors]
        if any(name not in self.graph.initializers for name in names):
            return None
        x_scale, scale = (self.graph.values(name) for name in names)
        # Groups of columns have scales in two dimensions, and products in other units than the sum.
        if x_scale.size != 1 or scale.ndim > 1 or scale.size not in (1, channels):
            return None
        product = (x_scale.reshape(()) * scale).astype(np.float32)
        return product.reshape(()) if product.size == 1 else product if (product > 0).all() else None


def find_slot(graph: Graph, tensor: str) -> Slot | str:
    """Finds where a bias of a tensor goes.

    Args:
        graph: of the quantized model.
        tensor: that is to be raised.

    Returns:
        The place, or why there is none.
    """
    node = graph.producers[tensor]
    if node.op_type == "Add":
        found = [_of_bias(graph, node, i) for i in range(2) if node.input[i] in graph.constants]
        return found[0] if len(found) == 1 else "nothing constant is added to its output"
    if node.op_type.startswith("Q"):
        return f"{node.op_type} computes it on codes, and is not corrected: quantize in the format QDQ"
    if node.op_type not in BIAS_INPUTS:
        return f"the {node.op_type} that puts out its result takes no bias"
    index, factor = BIAS_INPUTS[node.op_type], float(attribute(node, "beta", 1.0))
    if factor == 0 or (factor != 1 and any(_is_dequantized(graph, name) for name in node.input)):
        return f"its beta is {factor:g}: its bias has no effect, or onnxruntime forgets that where it computes on codes"
    if len(node.input) <= index or not node.input[index]:
        return EmptySlot(graph, node, index, factor)
    return _of_bias(graph, node, index, factor, node.op_type in ("Conv", "ConvTranspose"))


def _is_dequantized(graph: Graph, name: str) -> bool:
    return name in graph.producers and graph.producers[name].op_type == "DequantizeLinear"


def _of_bias(graph: Graph, node: Node, index: int, factor: float = 1.0, own: bool = False) -> Slot | str:
    """Finds the initializer that a node reads as its bias, at once or behind a node that unpacks it."""
    name = node.input[index]
    if name in graph.initializers:
        return _stored(graph, name, (node, index), tuple(graph.initializers[name].dims), own, factor)
    source = graph.producers.get(name)
    if source is None or not graph.is_private(name) or not all(each in graph.initializers for each in source.input):
        return "its bias is neither an initializer nor codes of its own"
    if source.op_type == "DequantizeLinear":
        codes, scale = (graph.initializers[each] for each in source.input[:2])
        if onnx().helper.tensor_dtype_to_np_dtype(codes.data_type) not in CODES:
            return "its bias is stored in codes of fewer than 8 bits, or in floating-point ones"
        sizes = np.prod(scale.dims, dtype=int), np.prod(codes.dims, dtype=int)
        return CodedBias(graph, source, own) if sizes[0] in (1, sizes[1]) else "its bias has scales by group"
    shape = _reshaped(graph, source)
    if shape is not None:
        return _stored(graph, source.input[0], (source, 0), shape, own, factor)
    return f"its bias is made by a {source.op_type}"


def _reshaped(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """Returns the shape that a node gives an initializer, or None for a node that does something else with it."""
    dims = tuple(graph.initializers[node.input[0]].dims) if node.input else ()
    if node.op_type == "Identity":
        return dims
    if node.op_type != "Reshape":
        return None
    shape = tuple(map(int, graph.values(node.input[1])))
    if 0 in shape:  # a dimension that stays
        return None
    rest = int(np.prod(dims, dtype=int)) // abs(int(np.prod(shape, dtype=int)))
    return tuple(rest if each == -1 else each for each in shape)


def _stored(
    graph: Graph, name: str, reader: tuple[Node, int], shape: tuple[int, ...], own: bool, factor: float
) -> Slot | str:
    kinds = onnx().TensorProto
    if graph.initializers[name].data_type not in (kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE, kinds.BFLOAT16):
        return "its bias is no floating-point number"
    return StoredBias(graph, name, reader, shape, own, factor)


def _fits(bias: tuple[int, ...], shape: tuple[int, ...], channel_axis: int, own: bool) -> bool:
    """Tells whether a bias of a shape adds a number of its own to each channel of an output."""
    if own:
        return bias == (shape[channel_axis],)
    wanted = [1] * len(shape)
    wanted[channel_axis] = shape[channel_axis]
    return len(bias) <= len(shape) and [1] * (len(shape) - len(bias)) + list(bias) == wanted


def _replaced(graph: Graph, name: str, reader: tuple[Node, int], had: Any, values: np.ndarray) -> Edit | None:
    """Puts other values in place of an initializer, or beside it where other nodes read it, too."""
    if np.array_equal(had, values):
        return None
    node, index = reader
    if graph.is_private(name):
        return Edit("bias", {name: _tensor(values, name)})
    fresh = graph.fresh(f"{node.output[0]}_bias")
    return Edit("bias", {fresh: _tensor(values, fresh)}, {node.output[0]: _with_input(node, index, fresh)})


def _tensor(values: np.ndarray, name: str) -> Initializer:
    return onnx().numpy_helper.from_array(values, name)


def _with_input(node: Node, index: int, name: str) -> Node:
    """Returns a copy of a node that reads another tensor. Optional inputs before it stay empty."""
    result = onnx().NodeProto()
    result.CopyFrom(node)
    result.input.extend([""] * (index + 1 - len(node.input)))
    result.input[index] = name
    return result
