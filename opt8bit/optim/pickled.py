"""Optimizers that an earlier version pickled whole: their states are renewed, and new options are added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt8bit.backends import stored_as
from opt8bit.optim import shards
from opt8bit.optim.old_layout import is_old, old_absmax, renewed_codes
from opt8bit.optim.options import DEFAULTS

if TYPE_CHECKING:
    from opt8bit.optim.ruled import Ruled


def renew(optimizer: Ruled) -> None:
    """Makes an optimizer that has just been unpickled one of this version."""
    for group in optimizer.param_groups:
        for name, value in DEFAULTS.items():
            group.setdefault(name, value)
        signs = optimizer.every_state()
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            for name in [name for name in signs if is_old(state, name)]:
                _renew_state(param, state, name, signs[name], group["block_size"])


def _renew_state(param: Tensor, state: dict[str, Any], name: str, signed: bool, block_size: int) -> None:
    codes, scale = stored_as(name)
    renewed = renewed_codes(shards.local(state.pop(name)), signed)
    state |= shards.sharded({codes: renewed}, param, block_size)
    state[scale] = state.pop(old_absmax(name)).to(torch.float32)
