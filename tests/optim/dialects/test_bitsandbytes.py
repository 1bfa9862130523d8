"""State dicts of bitsandbytes are loaded; they are made here in its form, and by itself where it is installed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.states import check
from opt8bit.quant import dequantize_blockwise, dynamic_map, encode_state, quantize_blockwise

SHAPE = (17, 301)  # whose flat blocks of 256 do not end where rows do, but for the last, which is short
BLOCKS = 20
QMAPS = {signed: dynamic_map(signed) * (1 - 2**-20) for signed in (False, True)}  # nearly ours, as its own are


class Case(NamedTuple):
    ours: Callable[..., Optimizer8bit]
    slots: tuple[tuple[str, ...], ...]  # what state1 and state2 are
    signed: tuple[bool, ...]  # the map of state1 and of state2
    group: dict[str, Any]  # as saved
    hyper: dict[str, Any]  # as loaded
    norm: bool = False


TWO = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
MOMENTS = (("exp_avg",), ("exp_avg_sq",))
CASES: dict[str, Case] = {
    "AdamW": Case(opt8bit.AdamW8bit, MOMENTS, (True, False), {**ADAM, **TWO}, ADAM),
    "Adam": Case(opt8bit.Adam8bit, MOMENTS, (True, False), {**ADAM, **TWO}, {**ADAM, "decoupled_weight_decay": True}),
    "LAMB": Case(opt8bit.LAMB8bit, MOMENTS, (True, False), {**ADAM, **TWO}, ADAM, norm=True),
    "AdEMAMix": Case(
        opt8bit.AdEMAMix8bit,
        (("exp_avg", "exp_avg_slow"), ("exp_avg_sq",)),
        (True, False),
        {**ADAM, "betas": (0.8, 0.95, 0.99), "alpha": 3.0, "t_alpha": 50, "t_beta3": None},
        {**ADAM, "betas": (0.8, 0.95, 0.99), "alpha": 3.0, "t_alpha": 50, "t_beta3": 0},
    ),
    "Lion": Case(
        opt8bit.Lion8bit,
        (("exp_avg",),),
        (True,),
        {**ADAM, "eps": 0.0},
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1},
    ),
    "SGD": Case(
        opt8bit.SGD8bit,
        (("momentum_buffer",),),
        (True,),
        {"lr": 0.1, "betas": (0.8, 0), "eps": 0.0, "weight_decay": 0},
        {"lr": 0.1, "momentum": 0.8, "dampening": 0, "weight_decay": 0},
    ),
    "RMSprop": Case(
        opt8bit.RMSprop8bit,
        (("square_avg",),),
        (True,),
        {"lr": 0.1, "betas": (0.8, 0), "eps": 1e-6, "weight_decay": 0},
        {"lr": 0.1, "alpha": 0.8, "eps": 1e-6, "weight_decay": 0, "momentum": 0},
    ),
    "Adagrad": Case(
        opt8bit.Adagrad8bit,
        (("sum",),),
        (True,),
        {"lr": 0.1, "betas": (0.0, 0.0), "eps": 1e-6, "weight_decay": 0},
        {"lr": 0.1, "eps": 1e-6, "weight_decay": 0},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def contents(case: Case) -> dict[str, Tensor]:
    """Values of the states, by our names."""
    generator = torch.Generator().manual_seed(0)
    names = [name for slot in case.slots for name in slot]
    signed = {name: name in ("exp_avg", "exp_avg_slow", "momentum_buffer") for name in names}
    values = {name: torch.randn(SHAPE, generator=generator) for name in names}
    return {name: value if signed[name] else value.square() for name, value in values.items()}


def flat_codes(x: Tensor, signed: bool, block_size: int = 256) -> tuple[Tensor, Tensor]:
    codes, absmax = quantize_blockwise(x.reshape(1, -1), QMAPS[signed], block_size)
    return codes.reshape(x.shape), absmax[0]


def flat_values(codes: Tensor, absmax: Tensor, signed: bool, block_size: int = 256) -> Tensor:
    return dequantize_blockwise(codes.reshape(1, -1), absmax[None], QMAPS[signed], block_size).reshape(codes.shape)


def made(case: Case, bits: int, block_size: int = 256, nested: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state dict as bitsandbytes returns it, and the values that it holds, by our names."""
    state: dict[str, Any] = {}
    held = contents(case)
    for number, (names, signed) in enumerate(zip(case.slots, case.signed, strict=True), 1):
        parts = [held[name] for name in names]
        if bits == 32:
            state[f"state{number}"] = torch.stack(parts) if len(parts) > 1 else parts[0]
            continue
        pairs = [flat_codes(part, signed, block_size) for part in parts]
        codes, absmaxes = (torch.stack(column) if len(parts) > 1 else column[0] for column in zip(*pairs, strict=True))
        state |= {f"state{number}": codes, f"qmap{number}": QMAPS[signed], f"absmax{number}": absmaxes}
        held |= {name: flat_values(*pair, signed, block_size) for name, pair in zip(names, pairs, strict=True)}
    if case.norm:
        state["unorm_vec"] = torch.ones(1)
    state = {"step": 3, "__bnb_optimizer_quant_state__": state} if nested else {"step": 3, **state}
    return {"state": {0: state}, "param_groups": [{**case.group, "params": [0]}]}, held


def loaded(case: Case, state_dict: dict[str, Any], **options: Any) -> tuple[Optimizer8bit, nn.Parameter]:
    param = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    optimizer = case.ours([param], **options)
    optimizer.load_state_dict(state_dict)
    return optimizer, param


@pytest.mark.parametrize("nested", [True, False])  # older versions do not
@pytest.mark.parametrize("block_size", [256, 2048])  # of older versions
@pytest.mark.parametrize("bits", [32, 8])
def test_states_are_those_of_bitsandbytes(case: Case, bits: int, block_size: int, nested: bool) -> None:
    state_dict, held = made(case, bits, block_size, nested)
    optimizer, param = loaded(case, state_dict, state_bits=32)
    group, state = optimizer.param_groups[0], optimizer.state[param]
    assert {name: group[name] for name in case.hyper} == case.hyper
    assert set(group) == {*optimizer.defaults, "params"}
    assert state["step"] == 3 and set(state) == {"step", *held}
    for name, value in held.items():
        assert torch.equal(state[name], value)


def test_states_are_coded_anew_in_blocks_of_rows(case: Case) -> None:
    state_dict, held = made(case, 8)
    optimizer, param = loaded(case, state_dict)
    group, state = optimizer.param_groups[0], optimizer.state[param]
    rule = optimizer.rule(group)
    check("parameter", param, rule, group, state)
    for name, signed in rule.states.items():
        codes, scale = encode_state(held[name], signed, 256)
        assert torch.equal(state[f"{name}_codes"], codes) and torch.equal(state[f"{name}_scale"], scale)
    param.grad = torch.ones(SHAPE)
    optimizer.step()
    assert param.isfinite().all()


def test_a_square_that_was_coded_a_little_below_zero_is_zero() -> None:
    """It codes squares by the signed map, where the code before 0 is as good as 0's."""
    case = CASES["Adagrad"]
    state_dict, _ = made(case, 8)
    quant_state = state_dict["state"][0]["__bnb_optimizer_quant_state__"]
    quant_state["state1"][0, 0] = 126
    optimizer, param = loaded(case, state_dict, state_bits=32)
    assert optimizer.state[param]["sum"][0, 0] == 0
    quant_state["state1"][0, 0] = 0
    with pytest.raises(ValueError, match="'state1' must not be negative"):
        loaded(case, state_dict)


def test_groups_without_states_are_known_by_what_they_hold() -> None:
    optimizer, param = loaded(CASES["SGD"], {"state": {}, "param_groups": [{**CASES["SGD"].group, "params": [0]}]})
    assert optimizer.param_groups[0]["momentum"] == 0.8 and "betas" not in optimizer.param_groups[0]
    assert not optimizer.state[param]


def put(name: str, value: Any) -> Any:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("state2"), "lacks the state 'state2'"),
        (lambda state: state.pop("qmap1"), "lacks the state 'qmap1'"),
        (lambda state: state.pop("absmax1"), "lacks the state 'absmax1'"),
        (lambda state: (state.pop("absmax1"), state.pop("qmap1")), "'state1' must .* got .* torch.uint8"),
        (put("state1", torch.zeros(SHAPE)), "'state1' must .* be torch.uint8"),
        (put("state1", torch.zeros(2, *SHAPE, dtype=torch.uint8)), r"'state1' must have shape \(17, 301\)"),
        (put("absmax1", torch.zeros(19)), r"'absmax1' must have shape \(20,\)"),
        (put("absmax1", torch.zeros(17, 2)), r"'absmax1' must have shape \(20,\)"),
        (put("absmax1", torch.full((BLOCKS,), torch.nan)), "'absmax1' must be finite"),
        (put("absmax2", 3), "'absmax2' must be a tensor, got int"),
        (put("qmap2", torch.zeros(256)), "'qmap2': codebook values must be finite and strictly ascending"),
        (put("qmap2", torch.zeros(16)), r"'qmap2' must have shape \(256,\)"),
        (put("max1", torch.zeros(1)), "has a state 'max1', but adamw has"),  # of 8-bit states that are not block-wise
    ],
)
def test_a_damaged_state_is_refused(change: Any, message: str) -> None:
    state_dict, _ = made(CASES["AdamW"], 8)
    change(state_dict["state"][0]["__bnb_optimizer_quant_state__"])
    with pytest.raises(ValueError, match=f"parameter 0 .*{message}"):
        loaded(CASES["AdamW"], state_dict)


@pytest.mark.parametrize(
    ("ours", "made_as", "options", "message"),
    [
        (opt8bit.AdamW8bit, "Lion", {}, "lacks the state 'state2'"),
        (opt8bit.Lion8bit, "AdamW", {}, "has a state 'state2', but lion has step, exp_avg"),
        (opt8bit.AdEMAMix8bit, "AdamW", {}, "betas must be 3 numbers"),
        (opt8bit.AdamW8bit, "AdamW", {"amsgrad": True}, "can be loaded for adam, .*, not for adamw_amsgrad"),
        (opt8bit.LARS8bit, "SGD", {}, "not for lars_momentum"),
        (opt8bit.RMSprop8bit, "RMSprop", {"momentum": 0.9}, "not for rmsprop_momentum"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    ours: type[Optimizer8bit], made_as: str, options: dict[str, Any], message: str
) -> None:
    state_dict, _ = made(CASES[made_as], 8)
    with pytest.raises(ValueError, match=message):
        loaded(CASES[made_as]._replace(ours=ours), state_dict, **options)


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "Adam": ("Adam", {"weight_decay": 0.1}),
    "AdEMAMix": ("AdEMAMix", {"t_alpha": 10, "t_beta3": 10}),
    "Lion": ("Lion", {"weight_decay": 0.1}),
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "RMSprop": ("RMSprop", {}),
    "Adagrad": ("Adagrad", {}),
}


@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", REAL)
def test_training_continues_as_with_bitsandbytes_itself(name: str, bits: int) -> None:
    """From its states, 32-bit or decoded, a step of ours is a step of its up to rounding."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs, hyper = REAL[name]
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(SHAPE, generator=generator))
    reference = getattr(bitsandbytes.optim, theirs if bits == 32 else f"{theirs}8bit")([param], **hyper)
    for _ in range(3):
        param.grad = torch.randn(SHAPE, generator=generator)
        reference.step()
    ours = nn.Parameter(param.detach().clone())
    optimizer = CASES[name].ours([ours], state_bits=32)
    optimizer.load_state_dict(reference.state_dict())
    ours.grad = torch.randn(SHAPE, generator=generator)
    param.grad = ours.grad.clone()
    reference.step()
    optimizer.step()
    torch.testing.assert_close(ours, param, rtol=2e-6, atol=2e-6)
