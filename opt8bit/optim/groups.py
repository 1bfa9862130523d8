"""The parameter groups of a state dict: which hyper-parameters an optimizer takes from them, and of what kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from opt8bit.optim.reading import STEP_DTYPES, described, flaw, is_number

if TYPE_CHECKING:
    from opt8bit.optim.ruled import Ruled


class Policy(NamedTuple):
    """Lists what of a parameter group a state dict cannot change, and what it must pass."""

    kept: Collection[str]  # options that stay the optimizer's: how states are stored and computed
    check: Callable[[dict[str, Any]], None]  # raises ValueError for a group that the optimizer cannot have


def merged_group(
    optimizer: Ruled,
    group: Mapping[str, Any],
    saved: Mapping[str, Any],
    unused: Collection[str],
    missing: Collection[str],
    policy: Policy,
) -> dict[str, Any]:
    """Returns a group with the saved hyper-parameters, the optimizer's options of storage, and what else was saved.

    Raises:
        ValueError: a hyper-parameter is missing, of another kind than the optimizer's, or out of range.
    """
    defaults = optimizer.defaults
    hyper = [name for name in defaults if name not in policy.kept]
    lacking = [name for name in hyper if name not in saved and name not in missing]
    if lacking:
        raise ValueError(f"it is not one of {type(optimizer).__name__}: it has no {', '.join(lacking)}")
    taken = {name: value for name, value in saved.items() if name in defaults or name not in unused}
    for name in hyper:
        if name in taken:
            _check_kind(name, taken[name], defaults[name])
    merged = {name: _copied(name, value, group.get(name)) for name, value in taken.items() if name not in policy.kept}
    merged = {**{name: group[name] for name in hyper}, **merged, **{name: group[name] for name in policy.kept}}
    policy.check(merged)
    return merged


TENSORS = ("lr", "betas")  # what may be in tensors of one element, as torch.optim has it for torch.compile's sake


def _is_number(name: str, value: Any) -> bool:
    if name in TENSORS and isinstance(value, Tensor):
        return not flaw(value) and value.numel() == 1 and value.dtype in STEP_DTYPES and is_number(value.item())
    return is_number(value)


def _are_numbers(name: str, value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(_is_number(name, item) for item in value)


KINDS: tuple[tuple[Any, Callable[[str, Any], bool], str], ...] = (  # by the type of a default: what may stand for it
    (bool, lambda name, value: isinstance(value, int) and value in (0, 1), "True or False"),
    ((Real, Tensor), _is_number, "a finite number"),
    ((tuple, list), _are_numbers, "finite numbers"),
    ((str, type(None)), lambda name, value: value is None or isinstance(value, str), "a string or None"),
)


def _check_kind(name: str, value: object, default: object) -> None:
    """Raises ValueError where a hyper-parameter is of another kind than its default."""
    for types, is_one, kind in KINDS:
        if isinstance(default, types):
            if not is_one(name, value):
                raise ValueError(f"{name} must be {kind}, got {described(value)}")
            return


def _copied(name: str, value: Any, had: Any) -> Any:
    """Returns a copy; of a tensor, only its value, on the device of the tensor that it replaces.

    Raises:
        ValueError: it cannot be copied.
    """
    if isinstance(value, Tensor):
        found = flaw(value)
        if found:
            raise ValueError(f"{name} must be a dense tensor, got {found}")
        return value.detach().to(had.device if isinstance(had, Tensor) else value.device, copy=True)
    try:
        return copy.deepcopy(value)
    except Exception as error:
        raise ValueError(f"{name} cannot be copied: {error}") from None
