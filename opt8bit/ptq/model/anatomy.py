"""Determines what a block does with its linear layers, by watching it run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import linear_layers, matrix
from opt8bit.ptq.model.experts import expert_families, with_experts
from opt8bit.ptq.model.passes import Call, ModelError
from opt8bit.ptq.model.usage import used, watched


class Anatomy(NamedTuple):
    """Says what a block does with its linear layers, by name."""

    stages: list[list[str]]  # in the order of their calls; those of a stage read one tensor
    writers: set[str]  # whose output is added to the hidden states as it is, such as o_proj and down_proj
    overwritten: set[str]  # whose output is changed in place afterwards: who keeps it has to copy it
    left: dict[str, str]  # which stay as they are, and why


def anatomy(block: nn.Module, call: Call) -> Anatomy:
    """Runs a block a few times to find out what it does with its linear layers."""
    usage, order = used(block, call)
    tokens = call.hidden.shape[:2].numel()
    families = expert_families(block, usage, tokens)
    experts = {name for family in families for name in family}
    left = {}
    for name, use in usage.items():
        why = use.why_left(tokens)
        if why is not None and name not in experts:
            left[name] = why
    stages = _stages([(name, x) for name, x in order if name not in left])
    return Anatomy(with_experts(stages, families), stream_writers(block, call), overwritten(block, call), left)


def _stages(order: list[tuple[str, Tensor]]) -> list[list[str]]:
    """Returns the names in the order of their calls; those that read one tensor go together.

    So queries, keys and values are one stage and share their statistics, and so are the two halves of a gated MLP.
    """
    result: list[list[str]] = []
    last: Tensor | None = None
    for name, x in order:
        if x is not last:
            result.append([])
        result[-1].append(name)
        last = x
    return result


def apart(order: list[list[str]], names: set[str]) -> list[list[str]]:
    """Divides stages so that each of the named layers has one of its own."""
    result: list[list[str]] = []
    for stage in order:
        last_is_alone = True
        for name in stage:
            if name in names or last_is_alone:
                result.append([])
            result[-1].append(name)
            last_is_alone = name in names
    return result


def stream_writers(block: nn.Module, call: Call) -> set[str]:
    """Returns the linear layers whose output is added to the hidden states as it is, such as ``o_proj``.

    A trial determines it: with all other layers silent, the block returns its input plus what the layer puts out.
    """
    usage, _ = used(block, call)
    layers = {name: layer for name, layer in linear_layers(block).items() if usage[name].returns_tensor}
    features, tokens = call.hidden.shape[-1], call.hidden.shape[:2].numel()
    found: set[str] = set()
    for name, layer in layers.items():
        if len(matrix(layer)) != features or usage[name].why_left(tokens) is not None:
            continue
        trial = torch.randn(features, generator=torch.Generator().manual_seed(0), device="cpu").to(call.hidden)
        outputs = {other: trial if other == name else trial.new_zeros(len(matrix(layers[other]))) for other in layers}
        with replaced({layers[other]: _constant(output) for other, output in outputs.items()}):
            if _gives(block, call, call.hidden + trial):
                found.add(name)
    return found


def _gives(block: nn.Module, call: Call, expected: Tensor) -> bool:
    try:
        return torch.allclose(call.of(block), expected)
    except ModelError:  # it cannot do without what a layer computes
        return False


def overwritten(block: nn.Module, call: Call) -> set[str]:
    """Returns the linear layers whose output the block changes in place, as Falcon's does to save memory."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, x: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name] = (output, output.clone())

    with watched(linear_layers(block), see):
        call.of(block)
    return {name for name, (output, copy) in seen.items() if not torch.equal(output, copy)}


def _constant(output: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x, **_: output.expand(*x.shape[:-1], -1).clone()


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Lets each module run the function given for it inside the context, and its own afterwards."""
    had = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in had.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
