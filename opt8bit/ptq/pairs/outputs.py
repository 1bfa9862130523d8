"""The tensor in what a module returns: the output itself, or one element of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Element = int | str | None


def element_of(output: Any, element: Element, name: str) -> Tensor:
    """Returns the tensor in a module's output.

    Args:
        output: of the module; a tensor is returned as it is.
        element: index, key or attribute of the tensor in any other output; None where there is none to choose.
        name: of the module, for messages.

    Raises:
        ValueError: the output is no tensor and no element is given, or there is no tensor there.
    """
    if isinstance(output, Tensor):
        return output
    if element is None:
        raise ValueError(f"{name} returns {_described(output)}: say by element= which of it is meant")
    try:
        found = getattr(output, str(element)) if _is_attribute(output, element) else output[element]
    except (KeyError, IndexError, AttributeError, TypeError):
        found = None
    if not isinstance(found, Tensor):
        raise ValueError(f"{name} returns {_described(output)}, without a tensor at {element!r}")
    return found


def with_element(output: Any, value: Tensor, element: Element) -> Any:
    """Returns a module's output with another tensor where :func:`element_of` found one. The output is left as it is."""
    if isinstance(output, Tensor) or element is None:
        return value
    if isinstance(output, tuple):
        assert isinstance(element, int)
        parts = list(output)
        parts[element] = value
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    result: Any = copy.copy(output)
    if _is_attribute(output, element):
        setattr(result, str(element), value)
    elif isinstance(output, Mapping) and isinstance(element, int):  # as transformers' outputs have it
        result[list(output)[element]] = value
    else:
        result[element] = value
    return result


def _is_attribute(output: Any, element: Element) -> bool:
    return isinstance(element, str) and not isinstance(output, Mapping)


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(str, output))}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"
