"""The rules of kernels/update_rules.h for a GPU, by the same names: a step of elements in float32.

A rule has two functions. Its constants are numbers of one tensor's step, in float64, from the hyper-parameters in the
order of ``Rule.hyper``, the step, and the norms over the whole tensor, if the rule measures some; before they are
known, the norms are zero. Its update takes the elements, the states in the order of ``Rule.states``, and those numbers
in float32; and a measure, likewise, what the norms are of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from opt8bit.backends.triton.rules.adagrad import adagrad, adagrad_constants
from opt8bit.backends.triton.rules.adam import adam, adam_amsgrad, adam_constants, adamw, adamw_amsgrad
from opt8bit.backends.triton.rules.ademamix import ademamix, ademamix_constants
from opt8bit.backends.triton.rules.lamb import lamb, lamb_constants, lamb_measure
from opt8bit.backends.triton.rules.lars import lars, lars_constants, lars_measure, lars_momentum
from opt8bit.backends.triton.rules.lion import lion, lion_constants
from opt8bit.backends.triton.rules.rmsprop import (
    rmsprop,
    rmsprop_centered,
    rmsprop_centered_momentum,
    rmsprop_constants,
    rmsprop_momentum,
)
from opt8bit.backends.triton.rules.sgd import sgd, sgd_constants, sgd_momentum


class Functions(NamedTuple):
    constants: Any  # (hyper, step, norms) -> the constants
    constant_count: int
    update: Any  # (param, grad, states, constants) -> (param, states)
    measure: Any = None  # (param, grad, states, constants) -> two tensors


RULES = {
    "adam": Functions(adam_constants, 10, adam),
    "adam_amsgrad": Functions(adam_constants, 10, adam_amsgrad),
    "adamw": Functions(adam_constants, 10, adamw),
    "adamw_amsgrad": Functions(adam_constants, 10, adamw_amsgrad),
    "sgd": Functions(sgd_constants, 6, sgd),
    "sgd_momentum": Functions(sgd_constants, 6, sgd_momentum),
    "rmsprop": Functions(rmsprop_constants, 8, rmsprop),
    "rmsprop_momentum": Functions(rmsprop_constants, 8, rmsprop_momentum),
    "rmsprop_centered": Functions(rmsprop_constants, 8, rmsprop_centered),
    "rmsprop_centered_momentum": Functions(rmsprop_constants, 8, rmsprop_centered_momentum),
    "adagrad": Functions(adagrad_constants, 4, adagrad),
    "lion": Functions(lion_constants, 7, lion),
    "ademamix": Functions(ademamix_constants, 13, ademamix),
    "lamb": Functions(lamb_constants, 10, lamb, lamb_measure),
    "lars": Functions(lars_constants, 5, lars, lars_measure),
    "lars_momentum": Functions(lars_constants, 5, lars_momentum, lars_measure),
}
