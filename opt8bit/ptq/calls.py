"""How a model calls its blocks, and a block its layers, told by watching them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import linear_layers, matrix


class Call(NamedTuple):
    """How a model called one of its blocks: the hidden states first, and whatever else it passed."""

    hidden: Tensor  # (sequences, length, d)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, block: nn.Module) -> Tensor:
        """The hidden states that ``block`` makes of this call."""
        output = block(self.hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def one_token(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The least batch of its kind: it tells what a block is made of as well as a large one, and costs nothing."""
    first = {name: value[:1, :1] for name, value in batch.items()}
    if "attention_mask" in first:
        first["attention_mask"] = torch.ones_like(first["attention_mask"])
    return first


def returns_tuple(model: nn.Module, block: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether a block gives its hidden states alone or as the first of several. No other block need be able to run."""
    found: list[bool] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise _Seen

    handle = block.register_forward_hook(after)
    try:
        model(**one_token(batch), **no_cache(model))
    except _Seen:
        pass
    finally:
        handle.remove()
    return bool(found and found[0])


def block_calls(model: nn.Module, blocks: nn.ModuleList, batch: dict[str, Tensor], *, as_tuple: bool) -> list[Call]:
    """How the model calls each of its blocks on a batch; only the first call's hidden states mean anything.

    The blocks do not run: each hands its input on, ``as_tuple`` if that is how they return. So what the model
    computes on the way from the embedding (masks, positions, rotary angles) is seen as every single block gets it,
    whatever it depends on.

    Raises:
        ValueError: the model does not call all of its blocks, once each, with the hidden states first and as the
            block before returned them.
    """
    calls: list[Call] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise ValueError("a block is not called with hidden states (sequences, length, features) first")
        if calls and not (hidden is calls[-1].hidden or torch.equal(hidden, calls[-1].hidden)):
            raise ValueError(
                f"the model changes the hidden states between its blocks {len(calls) - 1} and {len(calls)}"
            )
        calls.append(Call(hidden, args[1:], kwargs))
        if len(calls) == len(blocks):
            raise _Seen
        return (hidden,) if as_tuple else hidden

    try:
        with replaced(dict.fromkeys(blocks, record)):
            model(**batch, **no_cache(model))
    except _Seen:
        return calls
    raise ValueError(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks")


class _Seen(Exception):
    """What was looked for is found: the rest of the forward pass need not run."""


def no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


class Anatomy(NamedTuple):
    """What a block does with its linear layers, by name."""

    stages: list[list[str]]  # in the order of their calls; those of a stage read one tensor
    writers: set[str]  # whose output is added to the hidden states as it is, such as o_proj and down_proj
    overwritten: set[str]  # whose output is changed in place afterwards: who keeps it has to copy it


def anatomy(block: nn.Module, call: Call) -> Anatomy:
    """
    Raises:
        ValueError: a layer is called twice, or never.
    """
    return Anatomy(stages(block, call), stream_writers(block, call), overwritten(block, call))


def stages(block: nn.Module, call: Call) -> list[list[str]]:
    """The names of a block's linear layers in the order they are called; those that read one tensor go together.

    So queries, keys and values are one stage and share their statistics, and so are the two halves of a gated MLP.

    Raises:
        ValueError: a layer is called twice, or never.
    """
    layers = linear_layers(block)
    order: list[tuple[str, Tensor]] = []
    with _watched(layers, lambda name, x: order.append((name, x))):
        call.of(block)
    called = [name for name, _ in order]
    for name in layers:
        if called.count(name) != 1:
            raise ValueError(f"{name} is called {called.count(name)} times in one pass of its block, expected once")
    result: list[list[str]] = []
    last: Tensor | None = None
    for name, x in order:
        if x is not last:
            result.append([])
        result[-1].append(name)
        last = x
    return result


def apart(order: list[list[str]], names: set[str]) -> list[list[str]]:
    """Stages of which each of the named layers has one of its own."""
    result: list[list[str]] = []
    for stage in order:
        last_is_alone = True
        for name in stage:
            if name in names or last_is_alone:
                result.append([])
            result[-1].append(name)
            last_is_alone = name in names
    return result


@contextmanager
def _watched(layers: dict[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Inside, ``see(name, input)`` runs before each of the layers does."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(name, inputs[0])

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_writers(block: nn.Module, call: Call) -> set[str]:
    """The linear layers whose output is added to the hidden states as it is, such as ``o_proj`` and ``down_proj``.

    Told by trial: with all other layers silent, the block returns its input plus what the layer puts out.
    """
    layers = linear_layers(block)
    features = call.hidden.shape[-1]
    found: set[str] = set()
    for name in (name for name, layer in layers.items() if matrix(layer).shape[0] == features):
        trial = torch.randn(features, generator=torch.Generator().manual_seed(0), device="cpu").to(call.hidden)
        outputs = {other: trial if other == name else trial.new_zeros(len(matrix(layers[other]))) for other in layers}
        with replaced({layers[other]: _constant(output) for other, output in outputs.items()}):
            if torch.allclose(call.of(block), call.hidden + trial):
                found.add(name)
    return found


def overwritten(block: nn.Module, call: Call) -> set[str]:
    """The linear layers whose output the block changes in place, as Falcon's does to save memory."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = (output, output.clone())

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in linear_layers(block).items()]
    try:
        call.of(block)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, (output, copy) in seen.items() if not torch.equal(output, copy)}


def _constant(output: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: output.expand(*x.shape[:-1], -1).clone()


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module runs the function given for it; afterwards what it ran before."""
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
