"""Tells how a parameter and its gradient lie in memory, as far as the kernels take them like that."""

from __future__ import annotations

import math

from torch import Tensor

from opt8bit.backends import Backend


def is_staged(backend: Backend, param: Tensor, grad: Tensor) -> bool:
    """Tells whether a backend takes contiguous copies of a parameter and of its gradient."""
    # A single number is contiguous whatever it is a view of, such as the imaginary part of a conjugate: what lies in
    # memory there is its negative.
    is_plain = param.is_contiguous() and grad.is_contiguous() and param.numel() > 1
    return backend.name != "reference" and not is_plain


def positions_of_channels(param: Tensor, grad: Tensor) -> int:
    """Returns how many positions a channel has, if in memory each row of both is (positions, channels); else 0.

    That is ``torch.channels_last`` and ``torch.channels_last_3d``, unless contiguous tensors lie in memory like that.
    """
    if param.dim() < 3 or param.is_contiguous() or not all(x.movedim(1, -1).is_contiguous() for x in (param, grad)):
        return 0
    return math.prod(param.shape[2:])
