"""State dicts for torch.optim: it loads them and continues."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import opt8bit
from opt8bit.optim import to_torch_state_dict
from opt8bit.optim.options import DEFAULTS


class Case(NamedTuple):
    ours: type[Any]  # an Optimizer8bit
    hyper: dict[str, Any]


CASES: dict[str, Case] = {
    "AdamW": Case(opt8bit.AdamW8bit, {"maximize": True, "betas": (0.8, 0.95)}),
    "AdamW amsgrad": Case(opt8bit.AdamW8bit, {"amsgrad": True}),
    "AdamW tensor lr": Case(opt8bit.AdamW8bit, {"lr": torch.tensor(0.01)}),
    "Adam": Case(opt8bit.Adam8bit, {"weight_decay": 0.1}),
    "Adam decoupled": Case(opt8bit.Adam8bit, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "SGD": Case(opt8bit.SGD8bit, {}),
    "SGD momentum": Case(opt8bit.SGD8bit, {"momentum": 0.9, "dampening": 0.5}),
    "RMSprop": Case(opt8bit.RMSprop8bit, {}),
    "RMSprop momentum": Case(opt8bit.RMSprop8bit, {"momentum": 0.9}),
    "RMSprop centered": Case(opt8bit.RMSprop8bit, {"centered": True, "momentum": 0.9}),
    "Adagrad": Case(opt8bit.Adagrad8bit, {"initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    "Muon": Case(opt8bit.Muon8bit, {"momentum": 0.8}),
}
HAS_UNCLAMPED = torch.__version__ >= (2, 14)  # type: ignore[operator]
if HAS_UNCLAMPED:
    CASES["Muon unclamped"] = Case(opt8bit.Muon8bit, {"adjust_lr_fn": "spectral_unclamped"})
STEPS = (0, 1, 3)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    case = CASES[request.param]
    if not hasattr(torch.optim, case.ours.counterpart):
        pytest.skip(f"this version of torch has no {case.ours.counterpart}")
    return case


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((16, 300), (5, 3))]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("bits", [32, 8])
def test_torch_loads_it_and_continues(case: Case, bits: int, steps: int) -> None:
    params = parameters()
    optimizer = case.ours(params, state_bits=bits, min_8bit_size=0, **case.hyper)
    train(optimizer, params, steps)
    state_dict = to_torch_state_dict(optimizer)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    theirs = getattr(torch.optim, case.ours.counterpart)(others)
    names = set(theirs.param_groups[0])
    theirs.load_state_dict(state_dict)
    assert set(theirs.param_groups[0]) == names
    assert all(tensor.dtype == torch.float32 for state in state_dict["state"].values() for tensor in state.values())
    train(optimizer, params, 1, seed=2)
    train(theirs, others, 1, seed=2)
    tolerance = 1e-4 if case.ours is opt8bit.Muon8bit else 1e-5  # Muon multiplies matrices in bfloat16
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(other, param, rtol=tolerance, atol=tolerance)


def test_the_way_there_and_back_is_exact(case: Case) -> None:
    """Every number of a code has that code again; but for a centered mean square, which is a rounded sum."""
    params = parameters()
    optimizer = case.ours(params, min_8bit_size=0, **case.hyper)
    train(optimizer, params, 3)
    back = case.ours(params, state_bits=32, **case.hyper)
    back.load_state_dict(to_torch_state_dict(optimizer))
    exact = case.ours(params, state_bits=32, **case.hyper)
    exact.load_state_dict(optimizer.state_dict())
    for param in params:
        for name in optimizer.rule(optimizer.param_groups[0]).states:
            pair = back.state[param][name], exact.state[param][name]
            if name == "variance":
                scale = exact.state[param]["grad_avg"].square() + exact.state[param]["variance"]
                assert ((pair[0] - pair[1]).abs() <= 2**-22 * scale).all()
            else:
                assert torch.equal(*pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = opt8bit.RMSprop8bit(params, centered=True, min_8bit_size=0)
    train(optimizer, params, 2)
    theirs = torch.optim.RMSprop(params, centered=True)
    theirs.load_state_dict(to_torch_state_dict(optimizer))
    train(theirs, params, 1)
    assert all(torch.view_as_real(p).isfinite().all() if p.is_complex() else p.isfinite().all() for p in params)


def test_groups_are_torchs_and_keep_what_schedulers_add() -> None:
    params = parameters()
    optimizer = opt8bit.AdamW8bit([{"params": params[:1], "lr": 0.5}, {"params": params[1:], "block_size": 64}])
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    groups = to_torch_state_dict(optimizer)["param_groups"]
    assert [group["lr"] for group in groups] == [0.5, 1e-3] and groups[0]["initial_lr"] == 0.5
    assert [group["params"] for group in groups] == [[0], [1]]
    ours = set(DEFAULTS) - set(torch.optim.AdamW(params).defaults)
    assert not any(ours & set(group) for group in groups)


def test_nothing_is_shared_with_the_optimizer() -> None:
    params = parameters()
    optimizer = opt8bit.AdamW8bit(params, state_bits=32, lr=torch.tensor(0.1))
    train(optimizer, params, 1)
    state_dict = to_torch_state_dict(optimizer)
    state_dict["param_groups"][0]["lr"].zero_()
    for state in state_dict["state"].values():
        for tensor in state.values():
            tensor.zero_()
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)
    assert all(tensor.any() for state in optimizer.state.values() for tensor in state.values())


def test_momentum_that_was_switched_on_begins_there() -> None:
    params = parameters()
    optimizer = opt8bit.SGD8bit(params)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["momentum"] = 0.9
    state_dict = to_torch_state_dict(optimizer)
    assert not state_dict["state"] and state_dict["param_groups"][0]["momentum"] == 0.9


def test_a_parameter_that_adagrad_has_not_stepped_gets_its_initial_sum() -> None:
    params = parameters()
    optimizer = opt8bit.Adagrad8bit(params, initial_accumulator_value=0.5)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    theirs = torch.optim.Adagrad(params)
    theirs.load_state_dict(to_torch_state_dict(optimizer))
    assert torch.equal(theirs.state[params[1]]["sum"], torch.full((5, 3), 0.5))
    train(theirs, params, 1)


@pytest.mark.parametrize(
    "ours", [opt8bit.Lion8bit, opt8bit.LAMB8bit, opt8bit.LARS8bit, opt8bit.AdEMAMix8bit], ids=lambda c: c.__name__
)
def test_what_torch_does_not_have_is_refused(ours: type[Any]) -> None:
    with pytest.raises(TypeError, match=f"torch.optim has no counterpart of {ours.__name__}"):
        to_torch_state_dict(ours(parameters()))


def test_other_optimizers_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="optimizer must be one of opt8bit, got AdamW"):
        to_torch_state_dict(torch.optim.AdamW(parameters()))  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
def test_a_hyper_parameter_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter group 0: torch.optim.Muon has no maximize, got True"):
        to_torch_state_dict(opt8bit.Muon8bit(parameters(), maximize=True))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
@pytest.mark.skipif(HAS_UNCLAMPED, reason="this version of torch has the function")
def test_a_function_that_this_version_of_torch_does_not_have_is_refused() -> None:
    optimizer = opt8bit.Muon8bit(parameters(), adjust_lr_fn="spectral_unclamped")
    with pytest.raises(ValueError, match=r"parameter group 0: torch.optim.Muon of torch .*spectral_unclamped is not"):
        to_torch_state_dict(optimizer)


def test_a_state_that_is_not_its_parameters_is_refused() -> None:
    params = parameters()
    optimizer = opt8bit.AdamW8bit(params, min_8bit_size=0)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["block_size"] = 64
    with pytest.raises(ValueError, match=r"parameter 0, of shape .* with block_size 64"):
        to_torch_state_dict(optimizer)
