"""FSDP1: states in 32 bits, which torch saves and loads by the parameters' own shapes, and a word on FSDP2."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

from processes import run

import opt8bit
from opt8bit.optim.states import FSDP1_MARK, MIN_FLAT_LENGTH


@pytest.mark.parametrize("use_orig_params", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_saved_optimizer_goes_on_with_the_same_bits(use_orig_params: bool) -> None:
    run("fsdp1.py", 2, use_orig_params)


def flat(length: int = MIN_FLAT_LENGTH, **attributes: Any) -> nn.Parameter:
    """A parameter as FSDP1 leaves it."""
    param = nn.Parameter(torch.empty(length))
    for name, value in {FSDP1_MARK: True, **attributes}.items():
        setattr(param, name, value)
    return param


def test_each_group_counts_what_would_have_been_in_8_bits() -> None:
    with pytest.warns(UserWarning, match="as FSDP1") as told:
        optimizer = opt8bit.AdamW8bit([flat(), flat(), flat(64), flat(state_bits=32), nn.Parameter(torch.empty(64))])
        optimizer.add_param_group({"params": flat()})
    counts = [str(warning.message).partition(" parameters")[0] for warning in told]
    assert counts == ["the states of 2", "the states of 1"]


def test_nothing_is_said_of_others() -> None:
    frozen = flat()
    frozen.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt8bit.AdamW8bit([nn.Parameter(torch.empty(MIN_FLAT_LENGTH)), nn.Parameter(torch.empty(64, 256)), frozen])
        opt8bit.AdamW8bit([flat(64), flat(state_bits=32)])
        opt8bit.AdamW8bit([flat()], state_bits=32)
