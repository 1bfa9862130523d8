"""State dicts of torch.optim are loaded: exactly into 32 bits, to the nearest code into 8."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.quant import decode_state, encode_state

SHAPES = ((16, 300), (32, 32))


class Case(NamedTuple):
    ours: Callable[..., Optimizer8bit]
    theirs: str
    hyper: dict[str, Any]


CASES: dict[str, Case] = {
    "AdamW": Case(opt8bit.AdamW8bit, "AdamW", {"lr": 0.01, "betas": (0.8, 0.95)}),
    "AdamW amsgrad": Case(opt8bit.AdamW8bit, "AdamW", {"amsgrad": True, "maximize": True}),
    "Adam": Case(opt8bit.Adam8bit, "Adam", {"weight_decay": 0.1, "eps": 1e-3}),
    "AdamW into Adam": Case(opt8bit.Adam8bit, "AdamW", {"weight_decay": 0.1}),
    "SGD": Case(opt8bit.SGD8bit, "SGD", {"lr": 0.1}),
    "SGD momentum": Case(opt8bit.SGD8bit, "SGD", {"momentum": 0.9, "dampening": 0.5}),
    "SGD nesterov": Case(opt8bit.SGD8bit, "SGD", {"momentum": 0.9, "nesterov": True}),
    "RMSprop": Case(opt8bit.RMSprop8bit, "RMSprop", {"alpha": 0.9}),
    "RMSprop momentum": Case(opt8bit.RMSprop8bit, "RMSprop", {"momentum": 0.9}),
    "RMSprop centered": Case(opt8bit.RMSprop8bit, "RMSprop", {"centered": True}),
    "RMSprop centered, momentum": Case(opt8bit.RMSprop8bit, "RMSprop", {"centered": True, "momentum": 0.9}),
    "Adagrad": Case(opt8bit.Adagrad8bit, "Adagrad", {"initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    "Muon": Case(opt8bit.Muon8bit, "Muon", {"momentum": 0.8}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    case = CASES[request.param]
    if not hasattr(torch.optim, case.theirs):
        pytest.skip(f"this version of torch has no {case.theirs}")
    return case


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def expected(name: str, state: dict[str, Any]) -> Tensor:
    if name == "variance":
        return (state["square_avg"] - state["grad_avg"].square()).clamp(min=0)
    return state[name]


@pytest.mark.parametrize("bits", [32, 8])
def test_states_are_those_of_torch(case: Case, bits: int) -> None:
    params = parameters()
    theirs = getattr(torch.optim, case.theirs)(params, **case.hyper)
    train(theirs, params, 3)
    state_dict = theirs.state_dict()
    kept = copy.deepcopy(state_dict)
    ours = case.ours(params, state_bits=bits, min_8bit_size=0)
    ours.load_state_dict(state_dict)
    group = ours.param_groups[0]
    assert {name: group[name] for name in case.hyper} == case.hyper
    rule = ours.rule(group)
    for param in params:
        parts = ("_codes", "_scale") if bits == 8 else ("",)
        stored = {"step", *(f"{name}{part}" for name in rule.states for part in parts)} if rule.states else set()
        assert set(ours.state[param]) == stored or not theirs.state[param]
        for name, signed in rule.states.items():
            exact = expected(name, theirs.state[param])
            if bits == 8:
                codes, scale = encode_state(exact, signed, 256)
                assert torch.equal(ours.state[param][f"{name}_codes"], codes)
                assert torch.equal(ours.state[param][f"{name}_scale"], scale)
            else:
                value = ours.state[param][name]
                assert torch.equal(value, exact) and value.data_ptr() != exact.data_ptr()
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert value is None or torch.equal(state_dict["state"][key][name], value)


def test_training_continues_as_torchs(case: Case) -> None:
    """With 32-bit states the next step differs by rounding alone, as it does without a state dict between."""
    params = parameters()
    theirs = getattr(torch.optim, case.theirs)(params, **case.hyper)
    train(theirs, params, 3)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    ours = case.ours(others, state_bits=32)
    ours.load_state_dict(theirs.state_dict())
    train(theirs, params, 1, seed=2)
    train(ours, others, 1, seed=2)
    # Muon multiplies matrices in bfloat16; the centered square root is of a difference that cancels.
    tolerance = {"Muon": 1e-4, "RMSprop": 1e-5}.get(case.theirs, 2e-6)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(other, param, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_states_have_the_parameters_dtype_there_and_full_precision_here(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    theirs = torch.optim.RMSprop(params, centered=True)
    train(theirs, params, 2)
    ours = opt8bit.RMSprop8bit(params, centered=True, state_bits=32)
    ours.load_state_dict(theirs.state_dict())
    full = torch.promote_types(dtype, torch.float32)
    for param in params:
        assert ours.state[param]["grad_avg"].dtype == ours.state[param]["variance"].dtype == full
        assert torch.equal(ours.state[param]["grad_avg"], theirs.state[param]["grad_avg"].to(full))
    train(ours, params, 1)


def test_a_state_dict_before_the_first_step_is_loaded(case: Case) -> None:
    params = parameters()
    ours = case.ours(params, **case.hyper)
    ours.load_state_dict(getattr(torch.optim, case.theirs)(params, **case.hyper).state_dict())
    train(ours, params, 1)


def test_a_momentum_buffer_that_has_not_begun_begins_with_an_undampened_gradient() -> None:
    param = nn.Parameter(torch.zeros(4))
    theirs = torch.optim.SGD([param], momentum=0.9, dampening=0.5)
    state_dict = {**theirs.state_dict(), "state": {0: {"momentum_buffer": None}}}
    ours = opt8bit.SGD8bit([param])
    ours.load_state_dict(state_dict)
    assert not ours.state[param]
    param.grad = torch.ones(4)
    ours.step()
    assert torch.equal(ours.state[param]["momentum_buffer"], torch.ones(4))


def test_a_step_may_be_a_number_as_it_once_was() -> None:
    param = nn.Parameter(torch.randn(4))
    theirs = torch.optim.AdamW([param])
    train(theirs, [param], 3)
    state_dict = theirs.state_dict()
    state_dict["state"][0]["step"] = 3
    state_dict["param_groups"][0] = {  # of torch 1.4
        **{"params": [0], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False}
    }
    ours = opt8bit.AdamW8bit([param])
    ours.load_state_dict(state_dict)
    assert torch.equal(ours.state[param]["step"], torch.tensor(3.0))


def test_adam_and_adamw_take_each_others_state_dicts_as_in_torch() -> None:
    param = nn.Parameter(torch.randn(4))
    theirs = torch.optim.Adam([param], weight_decay=0.5)
    train(theirs, [param], 1)
    ours = opt8bit.AdamW8bit([param])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["weight_decay"] == 0.5 and "decoupled_weight_decay" not in ours.param_groups[0]
    assert ours.rule(ours.param_groups[0]).name == "adamw"


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (opt8bit.AdamW8bit, "SGD", "it is not one of AdamW8bit: it has no betas, eps$"),
        (opt8bit.Lion8bit, "Adam", "has a state 'exp_avg_sq', but lion has step, exp_avg"),
        (opt8bit.Adagrad8bit, "RMSprop", "it is not one of Adagrad8bit: it has no lr_decay, initial_accumulator_value"),
        (opt8bit.LAMB8bit, "Adamax", "it is not one of LAMB8bit: it has no bias_correction, adapt"),
    ],
)
def test_a_state_dict_of_another_optimizer_is_refused(
    ours: Callable[..., Optimizer8bit], theirs: str, message: str
) -> None:
    params = parameters()
    reference = getattr(torch.optim, theirs)(params)
    train(reference, params, 1)
    with pytest.raises(ValueError, match=message):
        ours(params).load_state_dict(reference.state_dict())


def test_decoding_gives_back_what_was_coded() -> None:
    """Loading into 8 bits loses half a gap of the codebook at most."""
    params = parameters()
    theirs = torch.optim.AdamW(params)
    train(theirs, params, 3)
    ours = opt8bit.AdamW8bit(params, min_8bit_size=0)
    ours.load_state_dict(theirs.state_dict())
    state = ours.state[params[0]]
    for name, signed, half_gap in (("exp_avg", True, 0.0071), ("exp_avg_sq", False, 0.0036)):
        scale = state[f"{name}_scale"]
        value = decode_state(state[f"{name}_codes"], scale, signed, 256)
        bound = half_gap * scale.abs().repeat_interleave(256, 1)[:, :300]
        assert ((value - theirs.state[params[0]][name]).abs() <= bound).all()
