"""Copies, for every pass, what blocks change besides the hidden states, such as caches and shared keys."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

# Names under which models pass their caches, some of which are plain tuples or lists of tensors.
CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "past", "cache", "cache_params", "kv_cache", "state")


class State:
    """Holds what the blocks of one stream have changed or handed on so far, for one batch.

    A model passes the same object to several blocks, such as the dictionary in which Gemma 4's later blocks find the
    keys and values of earlier ones. Each stream works on its own copy of it, from its first block to its last. Tensors
    are never copied.
    """

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}  # by the id of what was recorded, which the recorded calls keep alive

    def own(self, value: Any) -> Any:
        """Returns what was recorded, as this stream has it."""
        return copied(value, self._copies)

    def hand(self, recorded: Any, made: Any) -> None:
        """Takes what a block of this stream has made, in place of what was recorded for it."""
        self._copies[id(recorded)] = made

    def snapshot(self) -> State:
        """Returns what it holds now, to run a block with while the stream's own pass goes on."""
        result, copies = State(), dict[int, Any]()
        result._copies = {key: copied(own, copies) for key, own in self._copies.items()}
        return result

    def keep(self, ids: frozenset[int]) -> None:
        """Lets go of everything but the copies of these: no later block is called with it."""
        self._copies = {key: own for key, own in self._copies.items() if key in ids}


def copied(value: Any, copies: dict[int, Any]) -> Any:
    """Copies containers, so that they can be changed without the original's; tensors and modules stay the same.

    Args:
        value: anything that is passed to a block.
        copies: what was copied before, by id; what is copied now is added.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple):
        parts = [copied(part, copies) for part in value]
        if all(part is old for part, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not is_container(value):
        return value
    result = copies[id(value)] = copy.copy(value)
    for key, part in _parts(value):
        own = copied(part, copies)
        if own is part:
            continue
        if isinstance(value, list | Mapping):
            result[key] = own
        else:
            setattr(result, key, own)
    return result


def is_container(value: Any) -> bool:
    """Tells whether a block can change what is in a value: a list, a dictionary, or an object such as a cache."""
    if isinstance(value, list | dict | set):
        return True
    # Modules, functions and classes are callable; a stream has no copies of them.
    return hasattr(value, "__dict__") and not isinstance(value, Tensor) and not callable(value)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the parts of a container that may be containers themselves, by key or name."""
    if isinstance(value, tuple | list):
        yield from enumerate(list(value))
    elif isinstance(value, Mapping):
        yield from list(value.items())
    elif hasattr(value, "__dict__"):
        yield from list(vars(value).items())


def flattened(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the tensors and containers in it, itself first, each with its path, and no container twice."""
    yield from _flattened(value, path, set())


def _flattened(value: Any, path: tuple[Any, ...], seen: set[int]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple) or is_container(value):
        if id(value) in seen:
            return
        seen.add(id(value))
        if not isinstance(value, tuple):
            yield path, value
        for key, part in _parts(value):
            yield from _flattened(part, (*path, key), seen)


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """Returns what :func:`flattened` found there."""
    for key in path:
        value = value[key] if isinstance(value, tuple | list | Mapping) else getattr(value, key)
    return value


def is_cache(name: str, value: Any) -> bool:
    """Tells whether an argument of a block holds what earlier calls have left."""
    if value is None or isinstance(value, Tensor | bool | int | str):
        return False
    named = name in CACHE_NAMES and (isinstance(value, tuple) or is_container(value))
    return named or any(base.__name__.endswith("Cache") for base in type(value).__mro__)


# Which part of a block's output are the hidden states: the first of several, whatever holds them.


def hidden_in(output: Any) -> Any:
    """Returns the hidden states in what a block returns."""
    key = _hidden_key(output)
    return output if key is None else at(output, (key,))


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Returns what a block returns, with other hidden states in it."""
    key = _hidden_key(output)
    if key is None:
        return hidden
    if isinstance(output, tuple):
        parts = [hidden, *output[1:]]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    result = copy.copy(output)
    if isinstance(output, list | Mapping):
        result[key] = hidden
    else:
        object.__setattr__(result, key, hidden)
    return result


def _hidden_key(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next(iter(output), None)
    if isinstance(output, tuple | list):
        return 0 if output else None
    if dataclasses.is_dataclass(output):
        return dataclasses.fields(output)[0].name
    return None


def placeholder(output: Any) -> Any:
    """Returns a copy with tensors of its own: what is passed on of it can be told from everything else."""
    copies = {id(part): part.clone() for _, part in flattened(output) if isinstance(part, Tensor)}
    return copied(output, copies)
