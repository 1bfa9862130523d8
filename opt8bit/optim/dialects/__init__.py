"""The forms of state dicts that can be loaded."""

from collections.abc import Sequence

from opt8bit.optim.dialects.bitsandbytes import BITSANDBYTES
from opt8bit.optim.dialects.dialect import Dialect, Group, Place, State, divided
from opt8bit.optim.dialects.own import OWN
from opt8bit.optim.dialects.torch_optim import TORCH

DIALECTS = (OWN, BITSANDBYTES, TORCH)


def dialect_of(group: Group, states: Sequence[State]) -> Dialect:
    """Returns the dialect of a parameter group and the states of its parameters."""
    return next(dialect for dialect in DIALECTS if dialect.is_of(group, states))


__all__ = ["DIALECTS", "Dialect", "Group", "Place", "State", "dialect_of", "divided"]
