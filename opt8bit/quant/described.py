"""Describes an object in words that are the same in another process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def described(value: Any) -> str:
    """Returns the class of an object with the values of its attributes; two of the same words are alike.

    ``repr`` would not do: a class may inherit it from another one, or name the object's address.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"Tensor({tuple(value.shape)}, {value.dtype}, {hashlib.blake2b(data, digest_size=16).hexdigest()})"
    if hasattr(value, "__qualname__"):  # a class or a function
        return f"{value.__module__}.{value.__qualname__}"
    return f"{described(type(value))}({', '.join(_parts(value))})"


def _parts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{described(key)}: {described(each)}" for key, each in value.items()]
    if isinstance(value, AbstractSet):
        return sorted(map(described, value))
    if isinstance(value, Sequence):
        return list(map(described, value))
    attributes = getattr(value, "__dict__", None)
    if attributes is None:  # as of numbers of numpy
        return [repr(value)]
    return [f"{name}={described(each)}" for name, each in attributes.items()]
