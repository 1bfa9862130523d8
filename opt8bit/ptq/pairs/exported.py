"""Gives exported models their layers back as modules, so that they can be matched and corrected by name."""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import fx

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
OPERATORS = ("linear", *CONVOLUTIONS)  # of aten; they take an input, then
OWN = ("weight", "bias")


class _Made(NamedTuple):
    """A layer that is a module again, and what its operator took beside the input."""

    module: fx.GraphModule
    arguments: tuple[object, ...]


def with_modules(model: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of an exported model in which linear layers and convolutions are modules under their old names.

    ``torch.export``, and quantizers that begin with it (pt2e), put out one graph of operators. Which module an operator
    comes from is noted there. Here each becomes a module again, with what makes its weight and its bias, so that
    :func:`correct` finds it. The copy computes the same. Quantizers for convolutions fold batch norms into them: the
    reference must be folded, too.

    Args:
        model: what ``torch.export.export(...).module()`` or ``convert_pt2e`` returns.

    Raises:
        TypeError: it is another kind of model.
        ValueError: no operator in it comes from a linear layer or a convolution.

    Example:
        >>> quantized = ptq.with_modules(convert_pt2e(prepared))  # doctest: +SKIP
        >>> ptq.correct(quantized, model, batches)  # doctest: +SKIP
    """
    if not isinstance(model, fx.GraphModule):
        raise TypeError(f"model must be an exported one, a torch.fx.GraphModule, got {type(model).__name__}")
    model = copy.deepcopy(model)
    made: dict[str, _Made] = {}
    for node in list(model.graph.nodes):
        name = _name(node)
        constants = _constants(node) if name else None
        if constants is None:
            continue
        if name not in made:
            made[name] = _Made(_layer(model, node, constants), node.args[1:])
        if made[name].arguments == node.args[1:]:  # else it is another operator of the same module
            _replace(node, name)
    if not made:
        raise ValueError("model must have linear layers or convolutions, its graph names none")
    _put(model, {name: layer.module for name, layer in made.items()})
    return model


def _put(model: fx.GraphModule, layers: dict[str, fx.GraphModule]) -> None:
    """Makes layers children of a model whose graph calls them, and drops what they have taken over."""
    read = _tensors(model)
    for name, layer in layers.items():
        model.add_submodule(name, layer)
    model.graph.eliminate_dead_code()
    for name in read - _tensors(model):
        if "." not in name:  # what the quantizer has put there
            delattr(model, name)
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()
    # Exported models refuse a change of mode. All that depended on it is in the graph.
    for refused in ("train", "eval"):
        vars(model).pop(refused, None)


def _tensors(model: fx.GraphModule) -> set[str]:
    """Returns the names of the tensors that a graph reads."""
    return {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}


def _name(node: fx.Node) -> str:
    """Returns the module that an operator comes from; empty where it is none of a layer."""
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in [getattr(torch.ops.aten, name) for name in OPERATORS]:
        return ""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def _constants(node: fx.Node) -> list[fx.Node] | None:
    """Returns what makes an operator's weight and bias, in order, or None where that depends on the model's input."""
    found: dict[fx.Node, None] = {}

    def visit(each: fx.Node) -> None:
        for before in each.all_input_nodes:
            if before not in found:
                visit(before)
        found[each] = None

    for each in node.all_input_nodes:
        if each is not node.args[0]:
            visit(each)
    return list(found) if all(each.op in ("get_attr", "call_function") for each in found) else None


def _layer(model: fx.GraphModule, node: fx.Node, constants: list[fx.Node]) -> fx.GraphModule:
    """Returns the operator as a module that takes its input. Untouched weights and biases keep their names."""
    graph, tensors = fx.Graph(), {}
    new = {node.all_input_nodes[0]: graph.placeholder("input")}
    own = {argument: name for argument, name in zip(node.args[1:3], OWN, strict=False) if isinstance(argument, fx.Node)}
    for each in [*constants, node]:
        new[each] = graph.node_copy(each, new.__getitem__)
        if each.op == "get_attr":
            name = new[each].target = own.get(each, f"constant_{each.name}")
            tensors[name] = attrgetter(str(each.target))(model)
    graph.output(new[node])
    return fx.GraphModule(tensors, graph)


def _replace(node: fx.Node, name: str) -> None:
    with node.graph.inserting_before(node):
        call = node.graph.call_module(name, node.args[:1])
    call.meta = node.meta
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
