"""Values of state dicts: what is read and what is refused. (test_checkpoint.py has them where they occur.)"""

import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

from opt8bit.optim.reading import described, flaw, is_number, read_full, read_step


@pytest.mark.parametrize("value", [0, 3, 2.5, numpy.float32(1), numpy.int64(2), Fraction(1, 2), -1.0])
def test_numbers(value: Any) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, None, "1", 1j, math.nan, math.inf, 10**400, torch.tensor(1.0), [1.0]])
def test_what_is_no_number(value: Any) -> None:
    assert not is_number(value)


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3), torch.tensor(3.0), torch.tensor(3.0).half()])
def test_steps(value: Any) -> None:
    step = read_step("a parameter", value)
    assert step.dtype == torch.float32 and step.shape == () and step == 3


@pytest.mark.parametrize("value", [-1, 0.5, math.nan, math.inf, 2**70, True, None, "3", [3], torch.tensor(-2)])
def test_what_is_no_step(value: Any) -> None:
    with pytest.raises(ValueError, match="a parameter: state 'step' must be a whole number of steps, got "):
        read_step("a parameter", value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_full_states_are_float32_or_of_a_larger_dtype(dtype: torch.dtype) -> None:
    value = torch.tensor([1.0, 2.0]).to(dtype)
    for param_dtype, full in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        tensor = read_full("a parameter", "exp_avg_sq", value, torch.zeros(2, dtype=param_dtype), signed=False)
        assert tensor.dtype == full and torch.equal(tensor, value.to(full))


def test_a_complex_parameter_has_complex_states() -> None:
    param = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"be torch.complex64 or torch.complex128, got .* torch.float32"):
        read_full("a parameter", "exp_avg", torch.zeros(2), param, signed=True)
    with pytest.raises(ValueError, match=r"'exp_avg_sq' must not be negative, got -1.0"):
        read_full("a parameter", "exp_avg_sq", torch.tensor([1j, -1j]), param, signed=False)


def test_flaws() -> None:
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(8)
    assert flaw(torch.zeros(4)) is None and flaw(torch.zeros(1).expand(4)) is None and flaw(torch.zeros(0)) is None
    assert flaw(freed) == "one whose memory was freed"
    assert flaw(torch.zeros(4).to_sparse()) == "one of layout torch.sparse_coo"
    assert flaw(torch.zeros(4, device="meta")) == "one on the meta device"
    assert flaw(torch.nn.Parameter(torch.zeros(4))) is None
    assert flaw(torch.nn.UninitializedParameter()) == "one of type UninitializedParameter"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        ("a", "'a'"),
        ((1.0, "b"), "(1.0, 'b')"),
        ([1, 2, 3, 4, 5], "[1, 2, 3, 4, ...]"),
        ([torch.zeros(3)], "[a Tensor]"),
        ({}, "a dict"),
    ],
)
def test_values_in_words(value: Any, words: str) -> None:
    assert described(value) == words
