"""Finds out how a distributed checkpoint stores states: in 8-bit codes, in full, or in the old layout."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from opt8bit.backends import stored_as
from opt8bit.optim.old_layout import old_absmax
from opt8bit.optim.ruled import SIGNS

CODES, SCALE = stored_as("")  # what the names of codes and scales end with
ABSMAX = old_absmax("")

Path = tuple["str | int", ...]  # the keys and indices that lead to a value of a nested state dict


class Form(NamedTuple):
    """Says how a state is stored."""

    words: str
    codes: str  # the name of its codes; of its values where it is in full
    scale: str | None  # the name of its scales; None where it is in full
    is_old: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return (self.codes,) if self.scale is None else (self.codes, self.scale)


def signs() -> dict[str, bool]:
    """Returns the states that optimizers have, and whether each of them can be negative."""
    return SIGNS


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields what a nested state dict holds, by paths, as torch.distributed.checkpoint takes it apart.

    Lists are leaves where neither tensors nor dicts are in them.
    """
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):  # which DCP asks for it
        yield from leaves(value.state_dict(), path)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and _holds_tensors(value):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def _holds_tensors(values: list[Any]) -> bool:
    return any(
        isinstance(value, (Tensor, Mapping)) or (isinstance(value, list) and _holds_tensors(value)) for value in values
    )


def name_of(path: Path) -> str:
    """Returns the name of a path in a checkpoint."""
    return ".".join(map(str, path))


def state_of(name: str) -> str | None:
    """Returns the state that a tensor of a checkpoint is a part of, by its full name without an ending.

    ``optimizer.state.weight.exp_avg_codes`` is a part of ``optimizer.state.weight.exp_avg``; what is no optimizer's is
    a part of none.
    """
    for ending in (CODES, SCALE, ABSMAX, ""):
        state = name.removesuffix(ending)
        *before, last = state.split(".")
        if name.endswith(ending) and last in signs() and "state" in before:
            return state
    return None


def is_signed(state: str) -> bool:
    """Tells whether a state, by its full name, can be negative."""
    return signs()[state.rpartition(".")[2]]


def form_of(state: str, names: Collection[str]) -> Form | None:
    """Returns how a state is stored, or None where there is nothing of it.

    Args:
        state: its full name, without an ending.
        names: of the tensors that there are.
    """
    if state + ABSMAX in names:
        return Form("in 8-bit codes of the old layout, beside an absmax", state, state + ABSMAX, is_old=True)
    if state in names:  # which wins over codes that lie beside it
        return Form("in 32 bits", state, None)
    if state + CODES in names or state + SCALE in names:
        return Form("in 8-bit codes", state + CODES, state + SCALE)
    return None
