"""What every optimizer's state dict must do; one enters by its row in the table."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, MUON, Case, parameter
from torch import Tensor, nn

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.states import CODEBOOKS, check
from opt8bit.quant import dequantize_blockwise

SHAPES = ((16, 300), (20, 16), (7,))  # with short blocks, of one block a row, and too small for codes
HALF_GAP = {True: 0.45 / 64, False: 0.45 / 128}  # of the dynamic map, by whether it is signed; in units of absmax
ROUNDING = 2**-20  # of the codebook's values, 7e-7 at most, and of the product with absmax


ROWS = {**CASES, **MUON}


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    return ROWS[request.param]


def parameters(case: Case, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in SHAPES if len(shape) == 2 or case.ours is not opt8bit.Muon8bit]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make(case: Case, params: list[nn.Parameter], **options: Any) -> Optimizer8bit:
    return case.ours(params, **{"min_8bit_size": 256, **case.hyper, **options})


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = (grad * torch.randn(param.shape, generator=generator).exp()).to(param.dtype)
        optimizer.step()


def saved(optimizer: Optimizer8bit) -> dict[str, Any]:
    """The state dict, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(optimizer: Optimizer8bit, param: Tensor) -> dict[str, Tensor]:
    """The states of a parameter, decoded."""
    group = optimizer.param_groups[0]
    state, states = optimizer.state[param], optimizer.rule(group).states
    return {
        name: dequantize_blockwise(state[name], state[f"{name}_absmax"], CODEBOOKS[signed], group["block_size"])
        if f"{name}_absmax" in state
        else state[name]
        for name, signed in states.items()
    }


def assert_same(a: Any, b: Any) -> None:
    """Two nested structures are equal, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"block_size": 64}),
        (torch.float32, {"state_bits": 32}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"compensation": True}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_bits": 32}),
    ],
)
def test_training_continues_bit_for_bit(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = parameters(case, dtype)
    optimizer = make(case, params, **options)
    train(optimizer, params, 3)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    other = case.ours(others, min_8bit_size=256, **options)  # whose hyper-parameters are those of the state dict
    other.load_state_dict(saved(optimizer))
    assert_same(other.state_dict(), optimizer.state_dict())
    train(optimizer, params, 3, seed=2)
    train(other, others, 3, seed=2)
    assert_same(other.state_dict(), optimizer.state_dict())
    assert all(torch.equal(*pair) for pair in zip(params, others, strict=True))


def test_a_state_dict_of_an_optimizer_that_has_not_stepped_is_loaded(stateful: Case) -> None:
    params = parameters(stateful)
    optimizer = make(stateful, params)
    train(optimizer, params, 1)
    optimizer.load_state_dict(saved(make(stateful, params)))
    assert not any(optimizer.state.values())
    train(optimizer, params, 1)


def test_loading_neither_changes_nor_keeps_the_state_dict(stateful: Case) -> None:
    params = parameters(stateful)
    optimizer = make(stateful, params)
    train(optimizer, params, 2)
    for options in ({}, {"block_size": 64}, {"state_bits": 32}):
        state_dict = saved(optimizer)
        kept = copy.deepcopy(state_dict)
        other = make(stateful, params, **options)
        other.load_state_dict(state_dict)
        train(other, params, 2)
        assert_same(state_dict, kept)
        theirs = {tensor.data_ptr() for state in state_dict["state"].values() for tensor in state.values()}
        ours = [tensor for state in other.state.values() for tensor in state.values()]
        assert not theirs & {tensor.data_ptr() for tensor in ours}
        assert len({tensor.data_ptr() for tensor in ours}) == len(ours)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"block_size": 64}),
        ({"block_size": 64}, {"block_size": 4096}),
        ({}, {"state_bits": 32}),
        ({"state_bits": 32}, {}),
        ({}, {"min_8bit_size": 4096}),
    ],
)
def test_states_are_stored_as_the_optimizer_that_loads_does(
    stateful: Case, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Decoded states are within half a gap of the codebook, times the absmax of the new block."""
    params = parameters(stateful)
    optimizer, other = make(stateful, params, **before), make(stateful, params, **after)
    train(optimizer, params, 3)
    other.load_state_dict(saved(optimizer))
    group = other.param_groups[0]
    fresh = make(stateful, copied := [nn.Parameter(param.detach().clone()) for param in params], **after)
    train(fresh, copied, 1)
    assert {name: group[name] for name in after} == after
    for param, copy_ in zip(params, copied, strict=True):
        check("parameter", param, other.rule(group), group, other.state[param])
        assert other.state[param]["step"] == 3
        forms = [{k: (v.shape, v.dtype) for k, v in o.state[p].items()} for o, p in ((other, param), (fresh, copy_))]
        assert forms[0] == forms[1]
        exact, loaded = values(optimizer, param), values(other, param)
        for name, signed in other.rule(group).states.items():
            difference = (loaded[name] - exact[name]).abs()
            absmax = other.state[param].get(f"{name}_absmax")
            if absmax is None:
                assert not difference.any()
            else:
                bound = absmax.repeat_interleave(group["block_size"], 1)[:, : param[0].numel()]
                assert (difference <= (HALF_GAP[signed] + ROUNDING) * bound).all()
    train(other, params, 2)
    assert all(param.isfinite().all() for param in params)


def test_rows_shorter_than_both_block_sizes_keep_their_bits() -> None:
    param = nn.Parameter(torch.randn(300, 16))
    optimizer, other = opt8bit.AdamW8bit([param]), opt8bit.AdamW8bit([param], block_size=64)
    train(optimizer, [param], 2)
    other.load_state_dict(saved(optimizer))
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_hyper_parameters_are_loaded_and_options_of_storage_are_not() -> None:
    params = [nn.Parameter(torch.randn(16, 256))]
    optimizer = opt8bit.AdamW8bit(params, lr=0.5, betas=(0.1, 0.2), maximize=True, amsgrad=True, block_size=64, seed=3)
    optimizer.param_groups[0]["initial_lr"] = 0.7
    other = opt8bit.AdamW8bit(params, state_bits=32, fused=False, min_8bit_size=7)
    other.load_state_dict(saved(optimizer))
    group = {name: value for name, value in other.param_groups[0].items() if name != "params"}
    assert group == {
        **{"lr": 0.5, "betas": (0.1, 0.2), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": True, "maximize": True},
        **{"initial_lr": 0.7, "block_size": 256, "min_8bit_size": 7, "state_bits": 32, "fused": False, "seed": 0},
        **{"stochastic_rounding": False, "compensation": False, "foreach": None},
        **{"capturable": False, "offload": False, "differentiable": False},
    }


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_compensation_is_kept_begun_or_dropped(before: bool, after: bool) -> None:
    params = [nn.Parameter(torch.randn(16, 256).bfloat16())]
    optimizer = opt8bit.AdamW8bit(params, compensation=before, min_8bit_size=0)
    train(optimizer, params, 2)
    other = opt8bit.AdamW8bit(params, compensation=after, min_8bit_size=0)
    other.load_state_dict(saved(optimizer))
    state = other.state[params[0]]
    assert ("compensation" in state) == after
    if after:
        expected = optimizer.state[params[0]]["compensation"] if before else torch.zeros(16, 256, 2, dtype=torch.uint8)
        assert torch.equal(state["compensation"], expected)
    train(other, params, 1)


def test_a_state_that_was_switched_off_is_not_loaded() -> None:
    params = [nn.Parameter(torch.randn(16, 256))]
    optimizer = opt8bit.AdamW8bit(params, amsgrad=True)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["amsgrad"] = False
    train(optimizer, params, 1)
    other = opt8bit.AdamW8bit(params)
    other.load_state_dict(saved(optimizer))
    assert "max_exp_avg_sq" not in other.state[params[0]]


def test_momentum_that_was_switched_on_begins_after_loading() -> None:
    params = [nn.Parameter(torch.randn(16, 256))]
    optimizer = opt8bit.SGD8bit(params)
    train(optimizer, params, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    other = opt8bit.SGD8bit(params)
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["momentum"] == 0.9 and not other.state[params[0]]
    train(other, params, 1)


def test_numbers_that_are_not_finite_stay_where_there_is_room_for_them() -> None:
    """As in a step, they do not change their neighbours; a code has no such value."""
    param = nn.Parameter(torch.randn(16, 256))
    optimizer = opt8bit.AdamW8bit([param], state_bits=32)
    train(optimizer, [param], 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg_sq"][3, 5] = torch.inf
    optimizer.load_state_dict(state_dict)
    assert optimizer.state[param]["exp_avg_sq"][3, 5] == torch.inf
    with pytest.raises(ValueError, match="'exp_avg_sq' must be finite to be stored in 8 bits"):
        opt8bit.AdamW8bit([param]).load_state_dict(state_dict)


def test_groups_are_read_each_by_its_own_options() -> None:
    params = [nn.Parameter(torch.randn(16, 256)) for _ in range(3)]
    groups = [{"params": params[:1], "block_size": 64}, {"params": params[1:], "amsgrad": True, "state_bits": 32}]
    optimizer = opt8bit.AdamW8bit(groups)
    train(optimizer, params, 2)
    groups = [{"params": params[:1]}, {"params": params[1:], "block_size": 32}]
    other = opt8bit.AdamW8bit(groups, min_8bit_size=0)
    other.load_state_dict(saved(optimizer))
    shapes = [tuple(other.state[param]["exp_avg_absmax"].shape) for param in params]
    assert shapes == [(16, 1), (16, 8), (16, 8)]
    assert [group["amsgrad"] for group in other.param_groups] == [False, True]


def test_user_hooks_see_plain_tensors_and_may_change_the_state_dict() -> None:
    param = nn.Parameter(torch.randn(16, 256))
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, [param], 1)
    state_dict = saved(optimizer)
    renamed = {**state_dict, "state": {"weight": state_dict["state"][0]}}
    seen = []

    def rename(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        seen.append(type(loaded["state"]["weight"]["exp_avg"]))
        return {**loaded, "state": {0: loaded["state"]["weight"]}}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(type(loaded.state[param]["exp_avg"])))
    optimizer.load_state_dict(renamed)
    assert seen == [Tensor, Tensor]
    assert_same(optimizer.state_dict()["state"], state_dict["state"])


Change = Callable[[dict[str, Any]], Any]


def put(name: str, value: Any, key: int = 0) -> Change:
    return lambda state_dict: state_dict["state"][key].update({name: value})


def drop(name: str) -> Change:
    return lambda state_dict: state_dict["state"][0].pop(name)


def put_group(name: str, value: Any) -> Change:
    return lambda state_dict: state_dict["param_groups"][0].update({name: value})


CODES, ABSMAX = torch.zeros(16, 256, dtype=torch.uint8), torch.zeros(16, 1)
FREED = torch.zeros(16, 256, dtype=torch.uint8)
FREED.untyped_storage().resize_(0)
DAMAGES: dict[str, tuple[Change, str]] = {
    # states
    "missing": (drop("exp_avg_sq"), r"shape \(16, 256\), lacks the state 'exp_avg_sq'"),
    "no absmax": (drop("exp_avg_absmax"), r"'exp_avg' must .* be torch.float32 or .*, got .* torch.uint8"),
    "no codes": (drop("exp_avg"), "lacks the state 'exp_avg'"),
    "no step": (drop("step"), "lacks the state 'step'"),
    "foreign": (
        put("momentum_buffer", CODES),
        "has a state 'momentum_buffer', but adamw has step, exp_avg, exp_avg_sq",
    ),
    "truncated": (put("exp_avg", CODES[:15]), r"'exp_avg' must have shape \(16, 256\) .* got \(15, 256\)"),
    "flat": (put("exp_avg", CODES.flatten()), r"got \(4096,\)"),
    "dtype": (put("exp_avg", CODES.float()), "be torch.uint8, got .* torch.float32"),
    "absmax of shape": (put("exp_avg_absmax", ABSMAX[:, 0]), r"'exp_avg_absmax' must have shape \(16, 1\)"),
    "absmax of dtype": (put("exp_avg_absmax", ABSMAX.double()), "'exp_avg_absmax' must .* be torch.float32"),
    "negative absmax": (put("exp_avg_absmax", ABSMAX - 1), "'exp_avg_absmax' must be finite and not negative"),
    "infinite absmax": (put("exp_avg_absmax", ABSMAX + torch.inf), "'exp_avg_absmax' must be finite"),
    "number": (put("exp_avg_sq", 3), "'exp_avg_sq' must be a tensor, got int"),
    "None": (put("exp_avg_sq", None), "'exp_avg_sq' must be a tensor, got NoneType"),
    "sparse": (put("exp_avg", CODES.to_sparse()), "must be a dense tensor, got one of layout torch.sparse_coo"),
    "meta": (put("exp_avg", CODES.to("meta")), "must be a dense tensor, got one on the meta device"),
    "freed": (put("exp_avg", FREED), "must be a dense tensor, got one whose memory was freed"),
    "step of shape": (put("step", torch.zeros(3)), r"'step' must have shape \(\)"),
    "negative step": (put("step", torch.tensor(-1.0)), "'step' must be a whole number of steps, got -1.0"),
    "NaN step": (put("step", torch.tensor(torch.nan)), "'step' must be a whole number of steps, got nan"),
    "half a step": (put("step", 0.5), "'step' must be a whole number of steps, got 0.5"),
    "huge step": (put("step", 10**400), "'step' must be a whole number of steps"),
    "step in words": (put("step", "3"), "'step' must be a whole number of steps, got '3'"),
    "negative square": (put("exp_avg_sq", -torch.ones(7), key=1), "'exp_avg_sq' must not be negative, got -1.0"),
    "complex": (put("exp_avg", torch.zeros(7) * 1j, key=1), "'exp_avg' must .* got .* torch.complex64"),
    # groups
    "foreign group": (
        lambda d: d["param_groups"][0].pop("betas"),
        "group 0: it is not one of AdamW8bit: it has no betas",
    ),
    "lr in words": (put_group("lr", "0.1"), "parameter group 0: lr must be a finite number, got '0.1'"),
    "NaN lr": (put_group("lr", torch.nan), "lr must be a finite number, got nan"),
    "two lrs": (put_group("lr", torch.zeros(2)), "lr must be a finite number"),
    "negative lr": (put_group("lr", -1.0), "parameter group 0: Invalid learning rate: -1.0"),
    "one beta": (put_group("betas", (0.9,)), "betas must be 2 numbers"),
    "betas out of range": (put_group("betas", (0.9, 1.5)), "Invalid beta parameter at index 1: 1.5"),
    "betas in words": (put_group("betas", ("a", 0.9)), "betas must be finite numbers"),
    "maximize": (put_group("maximize", None), "maximize must be True or False, got None"),
    "block size": (put_group("block_size", -1), "block_size must be a positive integer, got -1"),
    "another block size": (put_group("block_size", 128), r"'exp_avg_absmax' must have shape \(16, 2\)"),
    "no block size": (lambda d: d["param_groups"][0].pop("block_size"), "has a state 'exp_avg_absmax'"),
    "names": (put_group("param_names", ["a"]), "'param_names' must be 2 names"),
    "uncopyable": (put_group("extra", (i for i in range(3))), "group 0: extra cannot be copied"),
    # the whole
    "no state": (lambda d: d.pop("state"), "must have a dict 'state'"),
    "no groups": (lambda d: d.pop("param_groups"), "must have a list 'param_groups'"),
    "groups by number": (lambda d: d.update(param_groups={0: {}}), "must have a list 'param_groups', got dict"),
    "group is no dict": (lambda d: d.update(param_groups=[3]), "parameter group 0 must be a dict with a list 'params'"),
    "state is no dict": (lambda d: d["state"].update({0: [1]}), "state of parameter 0 must be a dict, got list"),
    "too many groups": (
        lambda d: d["param_groups"].append(d["param_groups"][0]),
        "has 2 parameter groups, the optimizer 1",
    ),
    "too few parameters": (put_group("params", [0]), "has 1 parameters, the optimizer's 2"),
    "a key twice": (put_group("params", [0, 0]), "its key 0 stands for parameter 0 .*, too"),
    "unhashable keys": (put_group("params", [[0], 1]), "'params' must be numbers or names"),
    "a stranger": (lambda d: d["state"].update({9: d["state"][0]}), "a state of a parameter 9, but no parameter group"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_dict_is_refused_and_nothing_changes(damage: str) -> None:
    params = [nn.Parameter(torch.randn(16, 256)), nn.Parameter(torch.randn(7))]
    optimizer = opt8bit.AdamW8bit(params)
    train(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict())
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    damaged = copy.deepcopy(before)
    change, message = DAMAGES[damage]
    change(damaged)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged)
    assert_same(optimizer.state_dict(), before)
    after = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    optimizer.load_state_dict(before)


def test_what_is_no_state_dict_is_refused() -> None:
    optimizer = opt8bit.AdamW8bit([nn.Parameter(torch.randn(3))])
    with pytest.raises(TypeError, match="a state dict must be a dict, got list"):
        optimizer.load_state_dict([])  # pyright: ignore[reportArgumentType]


def test_a_refusal_names_the_parameter() -> None:
    params = [nn.Parameter(torch.randn(16, 256)) for _ in range(3)]
    optimizer = opt8bit.AdamW8bit([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, 1)
    state_dict = saved(optimizer)
    del state_dict["state"][2]["exp_avg"]
    with pytest.raises(ValueError, match=r"parameter 2 \(group 1, number 1\), of shape .* lacks the state 'exp_avg'"):
        optimizer.load_state_dict(state_dict)
    state_dict["param_groups"][1]["param_names"] = ["head.weight", "tail.weight"]
    with pytest.raises(ValueError, match=r"parameter 'tail.weight', of shape .* lacks the state 'exp_avg'"):
        optimizer.load_state_dict(state_dict)


def test_parameters_may_go_by_name() -> None:
    params = [nn.Parameter(torch.randn(16, 256)) for _ in range(2)]
    optimizer = opt8bit.AdamW8bit(params)
    train(optimizer, params, 1)
    state_dict = saved(optimizer)
    state_dict["state"] = {"ab"[key]: state for key, state in state_dict["state"].items()}
    state_dict["param_groups"][0]["params"] = ["a", "b"]
    other = opt8bit.AdamW8bit(params)
    other.load_state_dict(state_dict)
    assert_same(other.state_dict(), optimizer.state_dict())
    del state_dict["state"]["b"]["step"]
    with pytest.raises(ValueError, match="parameter 'b', of shape"):
        other.load_state_dict(state_dict)


def test_a_rate_stays_where_it_is() -> None:
    """On its device, that is, where graphs read it; "meta" stands for a GPU."""
    saved = opt8bit.AdamW8bit([parameter()], lr=torch.tensor(0.1)).state_dict()
    optimizer = opt8bit.AdamW8bit([parameter()], lr=torch.tensor(0.2))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2, device="meta")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"].device.type == "meta"
    other = opt8bit.AdamW8bit([parameter()], lr=0.2)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == saved["param_groups"][0]["lr"]
    assert other.param_groups[0]["lr"] is not saved["param_groups"][0]["lr"]
