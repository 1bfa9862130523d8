"""What every optimizer's state dict must do; one enters by its row in the table."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, MUON, Case, parameter
from layouts_before import old_state_dict
from torch import Tensor, nn

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.states import check
from opt8bit.quant import decode_state, dequantize_blockwise, dynamic_map, encode_state

SHAPES = ((16, 300), (20, 16), (7,))  # with short blocks, of one block a row, and too small for codes
HALF_GAP = {True: 0.45 / 64, False: 0.45 / 128}  # of the dynamic map, by whether it is signed; in units of the scale
ROUNDING = 2**-20  # of the map's values, 7e-7 at most, and of the product with the scale


ROWS = {**CASES, **MUON}


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    return ROWS[request.param]


def parameters(case: Case, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in SHAPES if len(shape) == 2 or case not in MUON.values()]
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
        name: decode_state(state[f"{name}_codes"], state[f"{name}_scale"], signed, group["block_size"])
        if f"{name}_codes" in state
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


@pytest.mark.sampled(7)
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
    rule = {name: value for name, value in case.hyper.items() if name == "use_muon"}  # else names would choose it
    other = case.ours(others, min_8bit_size=256, **rule, **options)  # the state dict has all other hyper-parameters
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
    """Decoded states are within half a gap of the map, times the scale of the new block."""
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
            scale = other.state[param].get(f"{name}_scale")
            if scale is None:
                assert not difference.any()
            else:
                bound = scale.abs().repeat_interleave(group["block_size"], 1)[:, : param[0].numel()]
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
        **{"stochastic_rounding": False, "compensation": False, "foreach": None, "caution": False},
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
    shapes = [tuple(other.state[param]["exp_avg_scale"].shape) for param in params]
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
        seen.append(type(loaded["state"]["weight"]["exp_avg_codes"]))
        return {**loaded, "state": {0: loaded["state"]["weight"]}}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(type(loaded.state[param]["exp_avg_codes"])))
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


CODES, SCALE = torch.zeros(16, 256, dtype=torch.uint8), torch.zeros(16, 1)
FREED = torch.zeros(16, 256, dtype=torch.uint8)
FREED.untyped_storage().resize_(0)
LOST = SCALE.half()  # as if cast from what float16 has no room for, beside codes that are not those of 0


def of_states(codes: str, scale: str, square: str) -> dict[str, tuple[Change, str]]:
    """Damages that are refused alike under the names of either layout.

    Args:
        codes, scale: of the first moment.
        square: the codes of the second.
    """
    return {
        "missing": (drop(square), rf"parameter 0 .*shape \(16, 256\), lacks the state '{square}'"),
        "no codes": (drop(codes), f"parameter 0 .* lacks the state '{codes}'"),
        "truncated": (put(codes, CODES[:15]), rf"'{codes}' must have shape \(16, 256\) .* got \(15, 256\)"),
        "flat": (put(codes, CODES.flatten()), r"got \(4096,\)"),
        "dtype": (put(codes, CODES.int()), f"parameter 0 .*'{codes}' must .*be torch.uint8 .*, got .* torch.int32"),
        "codes between codes": (
            put(codes, CODES.float() + 0.5),
            f"parameter 0 .*'{codes}' must hold whole numbers from 0 to 255, got others in torch.float32",
        ),
        "codes beyond codes": (put(codes, CODES.float() + 256), f"'{codes}' must hold whole numbers from 0 to 255"),
        "codes below codes": (put(codes, CODES.half() - 1), f"'{codes}' must hold whole numbers from 0 to 255"),
        "codes that are NaN": (put(codes, CODES.half() * torch.nan), f"'{codes}' must hold whole numbers"),
        "scale of shape": (put(scale, SCALE[:, 0]), rf"parameter 0 .*'{scale}' must have shape \(16, 1\)"),
        "scale of another block size": (put(scale, SCALE.repeat(1, 2)), rf"'{scale}' .* got \(16, 2\)"),
        "scale of dtype": (put(scale, SCALE.long()), f"parameter 0 .*'{scale}' must .* be torch.float32 or .*int64"),
        "infinite scale": (put(scale, SCALE + torch.inf), f"'{scale}' must be finite"),
        "NaN scale": (put(scale, SCALE * torch.nan), f"parameter 0 .*'{scale}' must be finite"),
        "scale that is lost": (
            lambda d: d["state"][0].update({codes: CODES + 200, scale: LOST}),
            f"parameter 0 .*'{scale}' was cast to torch.float16, and became 0 for 16 blocks that hold numbers",
        ),
        "number": (put(square, 3), f"'{square}' must be a tensor, got int"),
        "None": (put(square, None), f"'{square}' must be a tensor, got NoneType"),
        "sparse": (put(codes, CODES.to_sparse()), "must be a dense tensor, got one of layout torch.sparse_coo"),
        "meta": (put(codes, CODES.to("meta")), "must be a dense tensor, got one on the meta device"),
        "freed": (put(codes, FREED), "must be a dense tensor, got one whose memory was freed"),
        "another block size": (put_group("block_size", 128), rf"'{scale}' must have shape \(16, 2\)"),
        "no block size": (
            lambda d: d["param_groups"][0].pop("block_size"),
            r"has a state 'exp_avg_\w+', but adamw has",
        ),
    }


OLD_DAMAGES: dict[str, tuple[Change, str]] = {
    **of_states("exp_avg", "exp_avg_absmax", "exp_avg_sq"),
    "no scale": (
        drop("exp_avg_absmax"),
        r"parameter 0 .*'exp_avg' must .* be torch.float32 or .*, got .* torch.uint8",
    ),
    "negative absmax": (
        put("exp_avg_absmax", SCALE - 1),
        "parameter 0 .*'exp_avg_absmax' must be finite and not negative",
    ),
    "negative absmax of squares": (
        put("exp_avg_sq_absmax", SCALE - 1),
        "'exp_avg_sq_absmax' must be finite and not negative",
    ),
    "codes of both layouts": (
        lambda d: d["state"][0].update(exp_avg=CODES.char(), exp_avg_codes=CODES, exp_avg_scale=SCALE),
        "'exp_avg' must .* got .* torch.int8",
    ),
}
DAMAGES: dict[str, tuple[Change, str]] = {
    # states
    **of_states("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes"),
    "no scale": (drop("exp_avg_scale"), r"parameter 0 .*shape \(16, 256\), lacks the state 'exp_avg_scale'"),
    "neither": (
        lambda d: [d["state"][0].pop(name) for name in ("exp_avg_codes", "exp_avg_scale")],
        "parameter 0 .*lacks the state 'exp_avg'",
    ),
    "missing in full": (lambda d: d["state"][1].pop("exp_avg_sq"), "parameter 1 .* lacks the state 'exp_avg_sq'"),
    "negative scale of squares": (
        put("exp_avg_sq_scale", SCALE - 1),
        "parameter 0 .*'exp_avg_sq_scale' must be finite and not negative",
    ),
    "codes as numbers": (
        lambda d: d["state"][0].update(exp_avg=d["state"][0].pop("exp_avg_codes")),
        "'exp_avg' must .* be torch.float32 or .*, got .* torch.uint8",
    ),
    "foreign": (
        put("momentum_buffer", CODES),
        "has a state 'momentum_buffer', but adamw has step, exp_avg, exp_avg_sq",
    ),
    "foreign codes": (put("square_avg_codes", CODES), "has a state 'square_avg_codes', but adamw has step, exp_avg"),
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


CASES_OF_DAMAGE = {
    **{f"now, {name}": (damage, False) for name, damage in DAMAGES.items()},
    **{f"before, {name}": (damage, True) for name, damage in OLD_DAMAGES.items()},
}


@pytest.mark.parametrize("name", CASES_OF_DAMAGE)
def test_a_damaged_state_dict_is_refused_and_nothing_changes(name: str) -> None:
    params = [nn.Parameter(torch.randn(16, 256)), nn.Parameter(torch.randn(7))]
    optimizer = opt8bit.AdamW8bit(params)
    train(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict())
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    (change, message), is_old = CASES_OF_DAMAGE[name]
    damaged = old_state_dict(optimizer) if is_old else copy.deepcopy(before)
    change(damaged)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged)
    assert_same(optimizer.state_dict(), before)
    after = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    optimizer.load_state_dict(before)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("options", [{}, {"block_size": 64}, {"state_bits": 32}], ids=str)
def test_the_layout_before_is_read_into_the_same_values(case: Case, options: dict[str, Any]) -> None:
    """Bit for bit, in blocks of the same size and into 32 bits; in other blocks as near as coding comes."""
    params = parameters(case)
    optimizer, other = make(case, params), make(case, params, **options)
    train(optimizer, params, 3)
    old = old_state_dict(optimizer)
    kept = copy.deepcopy(old)
    other.load_state_dict(old)
    assert_same(old, kept)
    signs = other.rule(other.param_groups[0]).states
    for key, param in enumerate(params):
        loaded = values(other, param)
        assert not {f"{name}_absmax" for name in signs} & set(other.state[param])
        for name, signed in signs.items():
            value, absmax = old["state"][key][name], old["state"][key].get(f"{name}_absmax")
            if absmax is None:
                assert torch.equal(loaded[name], value)
                continue
            expected = dequantize_blockwise(value, absmax, dynamic_map(signed), 256)
            if "block_size" in options and param.shape[1] > 64:  # else the blocks are the same
                expected = decode_state(*encode_state(expected, signed, 64), signed, 64)
            assert torch.equal(loaded[name], expected)
            if not options:
                assert torch.equal(other.state[param][f"{name}_scale"], absmax)
    again = make(case, params, **options)
    again.load_state_dict(saved(other))
    assert_same(again.state_dict(), other.state_dict())
    train(other, params, 2)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_an_optimizer_pickled_before_goes_on_with_the_same_values(stateful: Case, way: str) -> None:
    params = parameters(stateful)
    optimizer = make(stateful, params)
    train(optimizer, params, 3)
    old = old_state_dict(optimizer)
    for key, param in enumerate(params):  # as __getstate__ of the versions before had it
        optimizer.state[param] = old["state"][key]
    del optimizer.param_groups[0]["offload"], optimizer.param_groups[0]["seed"]
    both = pickle.loads(pickle.dumps((optimizer, params))) if way == "pickle" else copy.deepcopy((optimizer, params))
    expected = make(stateful, params)
    expected.load_state_dict(old)
    assert_same(both[0].state_dict(), expected.state_dict())
    train(both[0], both[1], 2, seed=2)
    train(expected, params, 2, seed=2)
    assert all(torch.equal(*pair) for pair in zip(both[1], params, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("is_old", [False, True])
def test_codes_and_scales_may_have_been_cast(is_old: bool, dtype: torch.dtype) -> None:
    """As by a tool that casts every tensor of a checkpoint; 8 bits of a code fit into every dtype."""
    param = nn.Parameter(torch.randn(16, 256))
    optimizer = opt8bit.AdamW8bit([param])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: full_range()}})
    state_dict = old_state_dict(optimizer) if is_old else saved(optimizer)
    cast = copy.deepcopy(state_dict)
    cast["state"][0] = {name: value.to(dtype) for name, value in cast["state"][0].items()}
    other = opt8bit.AdamW8bit([param])
    other.load_state_dict(state_dict)
    expected = {name: value.clone() for name, value in other.state[param].items()}
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        expected[name] = expected[name].to(dtype).float()
    other.load_state_dict(cast)
    assert_same(dict(other.state[param]), expected)


def full_range() -> dict[str, Tensor]:
    """A state of AdamW that has every code."""
    codes = torch.arange(256).byte().repeat(16, 1)
    moments = {f"{name}_codes": codes.clone() for name in ("exp_avg", "exp_avg_sq")}
    scales = {f"{name}_scale": torch.rand(16, 1) + 0.5 for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(3.0), **moments, **scales}


def test_every_code_is_loaded_as_it_is() -> None:
    optimizer = opt8bit.AdamW8bit([param := nn.Parameter(torch.randn(16, 256))])
    state = full_range()
    state["exp_avg_scale"][::2] *= -1
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    assert_same(dict(optimizer.state[param]), {name: state[name] for name in optimizer.state[param]})


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_flags_that_were_added_later_may_be_missing(name: str) -> None:
    """As torch.optim has it: the optimizer's own then."""
    options: dict[str, Any] = {name: True}
    param = nn.Parameter(torch.randn(16, 256))
    optimizer = opt8bit.AdamW8bit([param], **options)
    train(optimizer, [param], 1)
    state_dict = saved(optimizer)
    del state_dict["param_groups"][0][name]
    other = opt8bit.AdamW8bit([param], **options)
    other.load_state_dict(state_dict)
    assert other.param_groups[0][name] is True
    assert_same(other.state_dict(), optimizer.state_dict())


def test_what_is_no_state_dict_is_refused() -> None:
    optimizer = opt8bit.AdamW8bit([nn.Parameter(torch.randn(3))])
    with pytest.raises(TypeError, match="a state dict must be a dict, got list"):
        optimizer.load_state_dict([])  # pyright: ignore[reportArgumentType]


def test_a_refusal_names_the_parameter() -> None:
    params = [nn.Parameter(torch.randn(16, 256)) for _ in range(3)]
    optimizer = opt8bit.AdamW8bit([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, 1)
    state_dict = saved(optimizer)
    del state_dict["state"][2]["exp_avg_codes"]
    with pytest.raises(
        ValueError, match=r"parameter 2 \(group 1, number 1\), of shape .* lacks the state 'exp_avg_codes'"
    ):
        optimizer.load_state_dict(state_dict)
    state_dict["param_groups"][1]["param_names"] = ["head.weight", "tail.weight"]
    with pytest.raises(ValueError, match=r"parameter 'tail.weight', of shape .* lacks the state 'exp_avg_codes'"):
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
