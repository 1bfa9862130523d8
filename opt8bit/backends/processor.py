"""The abilities of the processor, as far as torch tells."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch


def has_bfloat16() -> bool:
    """Tells whether this processor has arithmetic for bfloat16, or torch cannot tell."""
    known = _capabilities()
    found = [known[name] for name in ("avx512_bf16", "amx_bf16", "bf16") if name in known]
    return any(found) or not found


def has_amx() -> bool:
    """Tells whether this processor has instructions that multiply tiles of bfloat16."""
    return _capabilities().get("amx_bf16", False)


def product_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which products of matrices are fast: bfloat16, but float32 on processors without it."""
    return torch.bfloat16 if device.type != "cpu" or has_bfloat16() else torch.float32


@functools.cache
def _capabilities() -> Mapping[str, Any]:
    """Returns what torch 2.10 and later know of this processor; an empty mapping with others."""
    return getattr(torch.cpu, "get_capabilities", dict)()
