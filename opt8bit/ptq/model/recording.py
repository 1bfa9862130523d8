"""Records how a model calls its blocks, while they do not run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.anatomy import replaced
from opt8bit.ptq.model.passes import Call, Refused, raised_by
from opt8bit.ptq.model.states import flattened, hidden_in, placeholder, with_hidden

HIDDEN = "hidden_states"  # what nearly all models call them


def no_cache(model: nn.Module) -> dict[str, Any]:
    """Returns the argument that keeps a model from building a cache, if it has one.

    A configuration may have it in one of its parts only, and the default in another: an argument overrules them all.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(param.name == "use_cache" for param in parameters):
        return {"use_cache": False}
    config: Any = getattr(model, "config", None)
    parts = [config, *(vars(config).values() if hasattr(config, "__dict__") else ())]
    known = any(hasattr(part, "use_cache") for part in parts)
    takes_any = any(param.kind is param.VAR_KEYWORD for param in parameters)
    return {"use_cache": False} if known and takes_any else {}


def taken(args: tuple[Any, ...], kwargs: dict[str, Any], tokens: torch.Size, axes: tuple[int, int] | None) -> Call:
    """Returns the call of a block with these arguments.

    Args:
        args: positional ones.
        kwargs: keyword ones.
        tokens: (sequences, length) of the model's input.
        axes: dimensions of sequences and length in the hidden states; None to find them.

    Raises:
        Refused: there are no hidden states among the arguments.
    """
    place: int | str | None = next((i for i, value in enumerate(args[:1]) if _are_hidden(value)), None)
    if place is None:
        names = [HIDDEN, *kwargs] if not args else []
        place = next((name for name in names if _are_hidden(kwargs.get(name))), None)
    if place is None:
        raise Refused("a block is not called with hidden states (sequences, length, features) first")
    hidden: Tensor = args[place] if isinstance(place, int) else kwargs[place]
    if axes is None:
        axes = _axes(hidden, tokens)
    args = args[1:] if isinstance(place, int) else args
    kwargs = {name: value for name, value in kwargs.items() if name != place}
    return Call(hidden if axes == (0, 1) else hidden.movedim(axes, (0, 1)), args, kwargs, place, axes)


def _are_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point()


def _axes(hidden: Tensor, tokens: torch.Size) -> tuple[int, int]:
    """Returns the dimensions of sequences and length: mostly the first two, but not in Gemma 3n and XLNet.

    Raises:
        Refused: no dimensions are as long as the input's.
    """
    last = hidden.dim() - 1  # of the features
    pairs = [(i, i + 1) for i in range(last - 1)] + [(i + 1, i) for i in range(last - 1)]
    for pair in pairs:
        if tuple(hidden.shape[dim] for dim in pair) == tuple(tokens):
            return pair
    if hidden.shape[0] == tokens[0] and hidden.shape[1] > tokens[1]:  # CPM-Ant has a prompt before the text
        return 0, 1
    raise Refused(f"the hidden states of {tuple(tokens)} tokens have shape {tuple(hidden.shape)}")


def same_hidden(before: Tensor, after: Tensor) -> bool:
    """Tells whether what a block is called with is what the block before it returned."""
    return after is before or (after.shape == before.shape and torch.equal(after, before))


def block_calls(
    model: nn.Module,
    blocks: nn.ModuleList,
    batch: dict[str, Tensor],
    outputs: Sequence[Any] | None = None,
    *,
    axes: tuple[int, int] | None = None,
    keeps_cache: bool = False,
    as_made: bool = False,
) -> list[Call]:
    """Records how the model calls each of its blocks on a batch; only the first call's hidden states mean anything.

    The blocks do not run: each hands its input on, in such a thing as it returns. So what the model computes on the way
    from the embedding (masks, positions, rotary angles) is seen as every single block gets it, whatever it depends on.

    Args:
        model: whose blocks need not be able to run.
        blocks: of it.
        batch: what the model is called with.
        outputs: what each block returns, for any input. Without them, blocks return only their hidden states.
        axes: dimensions of sequences and length in the hidden states; None to find them.
        keeps_cache: whether blocks are to have the model's cache.
        as_made: whether blocks hand on the ``outputs`` themselves, besides the hidden states, and not what stands for
            them in the calls of later blocks.

    Raises:
        Refused: the model does not call all of its blocks, once each and in order, with the hidden states as the block
            before returned them.
        ModelError: the model raised an exception.
    """
    calls: list[Call] = []
    stands: list[Any] = []
    tokens = batch["input_ids"].shape

    def record(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_order(model, i, len(calls))
        call = taken(args, kwargs, tokens, axes)
        if calls and not same_hidden(calls[-1].hidden, call.hidden):
            raise changed_between(i)
        calls.append(call if keeps_cache else call.without_cache())
        if i + 1 == len(blocks):
            raise _Seen
        hidden = args[0] if call.place == 0 else kwargs[call.place]  # type: ignore[index]
        stands.append(hidden)
        if outputs is not None:
            stands[-1] = with_hidden(outputs[i] if as_made else placeholder(outputs[i]), hidden)
        return stands[-1]

    options = {} if keeps_cache else no_cache(model)
    stubs = {block: _numbered(record, i) for i, block in enumerate(blocks)}
    try:
        with replaced(stubs), without_blocks(model):
            model(**batch, **options)
    except _Seen:
        return list(_linked(calls, [*stands, None]))
    raise Refused(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks")


def without_blocks(model: nn.Module) -> AbstractContextManager[None]:
    """Runs a model with stubs in place of its blocks inside the context, and refuses one that cannot run so."""
    return raised_by(f"{type(model).__name__} cannot run without its blocks: it", Refused)


def check_order(model: nn.Module, i: int, expected: int) -> None:
    """
    Raises:
        Refused: a block is called out of order.
    """
    if i != expected:
        raise Refused(f"{type(model).__name__} calls its block {i} where its block {expected} is expected")


def changed_between(i: int) -> Refused:
    """Returns the exception for hidden states that are not what the block before returned."""
    return Refused(f"the model changes the hidden states between its blocks {i - 1} and {i}")


def _numbered(record: Callable[..., Any], i: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: record(i, args, kwargs)


def _linked(calls: list[Call], outputs: list[Any]) -> Iterator[Call]:
    """Yields the calls, with what each block hands to later ones, and what those are called with."""
    later: frozenset[int] = frozenset()
    found = []
    for call, output in zip(reversed(calls), reversed(outputs), strict=True):
        hidden = hidden_in(output)  # which is every block's in a recording, and maybe an argument's for another reason
        hands = tuple((path, part) for path, part in flattened(output) if id(part) in later and part is not hidden)
        used = [part for _, part in flattened((call.args, call.kwargs))]
        found.append(call._replace(hands=hands, later=later))
        later |= {id(part) for part in used}
    yield from reversed(found)


class _Seen(BaseException):
    """Raised where what was looked for is found: the rest of the forward pass need not run."""


@contextmanager
def handing_on(blocks: nn.ModuleList, outputs: Sequence[Any], hidden: Tensor) -> Iterator[None]:
    """Lets every block return these hidden states inside the context, whatever it is called with."""

    def forward(output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: with_hidden(output, hidden)

    with replaced({block: forward(output) for block, output in zip(blocks, outputs, strict=True)}):
        yield
