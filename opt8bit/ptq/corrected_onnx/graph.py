"""An ONNX model's graph, with what puts out and what reads each of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt8bit.ptq.corrected_onnx.library import onnx

Model = Any  # an onnx.ModelProto: the package need not be there
Node = Any  # an onnx.NodeProto
Initializer = Any  # an onnx.TensorProto


class Behind(NamedTuple):
    """Lists what some tensors are computed by.

    Attributes:
        nodes: in the order of the graph.
        leaves: tensors that none of them puts out: initializers, inputs, and where the search was to end.
    """

    nodes: list[Node]
    leaves: set[str]


class Graph:
    """Finds nodes by their tensors. It is made once, and the model does not change meanwhile.

    Args:
        model: whose weights may lie in files beside it.
        folder: of these files.

    Attributes:
        initializers: by name.
        inputs: that have to be given, in order.
        outputs: names, in order.
        producers: the node that puts out a tensor, by the tensor's name.
        consumers: the nodes that read a tensor. Those that read it in a subgraph count.
        constants: names of tensors that do not depend on the inputs.
    """

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.initializers: dict[str, Initializer] = {each.name: each for each in model.graph.initializer}
        self.inputs: list[Any] = [each for each in model.graph.input if each.name not in self.initializers]
        self.outputs: list[str] = [each.name for each in model.graph.output]
        self.producers: dict[str, Node] = {}
        self.consumers: dict[str, list[Node]] = {}
        self.constants = set(self.initializers)
        self._order: dict[str, int] = {}
        for i, node in enumerate(model.graph.node):
            read = set(read_by(node))
            for name in read:
                self.consumers.setdefault(name, []).append(node)
            for name in filter(None, node.output):
                self.producers[name], self._order[name] = node, i
                if read <= self.constants:
                    self.constants.add(name)
        self._names = Counter(node.name for node in model.graph.node)
        self._by_name = {node.name: node for node in model.graph.node}

    @classmethod
    def load(cls, path: Path, what: str) -> Graph:
        """Reads a file, without the weights that lie beside it.

        Args:
            path: of the file.
            what: the file is, for messages.

        Raises:
            ImportError: onnx is not installed.
            ValueError: there is no such file, or it holds no ONNX model.
        """
        library = onnx()
        if not path.is_file():
            raise ValueError(f"{what} must be an ONNX file, there is no {path}")
        try:
            model = library.load(str(path), load_external_data=False)
        except Exception as error:  # of protobuf
            raise ValueError(f"{what} must be an ONNX file, {path} cannot be read: {error}") from error
        if not model.graph.node:
            raise ValueError(f"{what} must be an ONNX file with a graph, {path} has none")
        return cls(model, path.parent)

    def named(self, name: str) -> Node | None:
        """Returns the node of a name, or None if none or several have it."""
        return self._by_name[name] if name and self._names[name] == 1 else None

    def is_private(self, name: str) -> bool:
        """Tells whether a single node reads a tensor, and nobody else does."""
        return len(self.consumers.get(name, ())) == 1 and name not in self.outputs

    def values(self, name: str) -> np.ndarray:
        """Returns the values of an initializer, from whichever file they are in.

        Raises:
            ValueError: they cannot be read.
        """
        try:
            return onnx().numpy_helper.to_array(self.initializers[name], str(self.folder))
        except Exception as error:  # the file is not there, is too short, or is a link
            raise ValueError(f"the values of {name} cannot be read: {error}") from error

    def fresh(self, name: str) -> str:
        """Returns a name that no tensor has: this one, or a longer one."""
        taken = (self.producers, self.initializers, self.consumers, {each.name for each in self.inputs})
        while any(name in names for names in taken):
            name += "_"
        return name

    def float_type(self, name: str) -> int:
        """Returns the ONNX type of a constant's numbers, or of what codes stand for; float32 if it is not known."""
        kinds = onnx().TensorProto
        while name in self.producers and self.producers[name].input:
            source = self.producers[name]
            name = source.input[1 if source.op_type == "DequantizeLinear" else 0]
        kind = self.initializers[name].data_type if name in self.initializers else kinds.FLOAT
        return kind if kind in (kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE, kinds.BFLOAT16) else kinds.FLOAT

    def behind(self, outputs: Iterable[str], ends: Collection[str] = ()) -> Behind:
        """Finds what computes some tensors.

        Args:
            outputs: names of the tensors.
            ends: names of tensors whose origin does not matter.
        """
        rest, seen, leaves = list(outputs), set[str](), set[str]()
        found: dict[int, Node] = {}
        while rest:
            name = rest.pop()
            if name in seen:
                continue
            seen.add(name)
            node = None if name in ends else self.producers.get(name)
            if node is None:
                leaves.add(name)
            elif self._order[name] not in found:
                found[self._order[name]] = node
                rest += read_by(node)
        return Behind([found[i] for i in sorted(found)], leaves)

    def part(self, outputs: Collection[str]) -> Model:
        """Returns a model of the nodes that compute some tensors from the inputs, and no others."""
        nodes, leaves = self.behind(outputs)
        result = self.part_of(nodes, leaves, outputs)
        result.graph.input.extend(self.inputs)
        return result

    def part_of(self, nodes: Iterable[Node], leaves: Collection[str], outputs: Iterable[str]) -> Model:
        """Returns a model of some nodes, with the initializers among ``leaves`` and without inputs."""
        library = onnx()
        result = library.ModelProto()
        result.ir_version = self.model.ir_version
        result.opset_import.extend(self.model.opset_import)
        result.functions.extend(self.model.functions)
        result.graph.name = self.model.graph.name or "part"
        result.graph.node.extend(nodes)
        result.graph.initializer.extend(self.initializers[name] for name in sorted(leaves & self.initializers.keys()))
        result.graph.output.extend(library.ValueInfoProto(name=name) for name in outputs)
        return result


def read_by(node: Node) -> Iterator[str]:
    """Yields the names of the tensors that a node reads, those in its subgraphs included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from read_by(inner)
            yield from (each.name for each in graph.output)


def has_subgraph(node: Node) -> bool:
    """Tells whether a node has a graph within it, as loops and branches do."""
    return any(each.HasField("g") or len(each.graphs) for each in node.attribute)


def attribute(node: Node, name: str, default: Any) -> Any:
    """Returns the value of a node's attribute, or the default."""
    found = next((each for each in node.attribute if each.name == name), None)
    return default if found is None else onnx().helper.get_attribute_value(found)
