"""States that someone else reads and writes: zeroed, masked, grown, cut, put in full, or with others beside them.

A state in 8 bits must then mean what one in 32 bits means: each step is held against that of a twin with 32-bit states
of the same values, which were changed in the same way.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ANY_SHAPE, STATEFUL, Case, gradients, parameter, train, use
from torch import Tensor, nn

import opt8bit
from opt8bit.backends import stored_as
from opt8bit.optim.base import Optimizer8bit
from opt8bit.quant import decode_state, encode_state

SHAPE = (24, 300)
BLOCKS = (24, 5)  # of 64
pytestmark = pytest.mark.usefixtures("one_thread")
# Each operation of a rule rounds once, by half an ulp of its terms; no rule has more than 16 on the way to a result.
# Compiled kernels fuse other operations where states are coded. In the reference steps are the same, bit for bit.
ULPS = 16 * 2**-24
HALF_GAP = {True: 0.0071, False: 0.0036}  # of the map, by whether it is signed; in units of the scale


def signs_of(optimizer: Optimizer8bit) -> dict[str, bool]:
    return dict(optimizer.rule(optimizer.param_groups[0]).states)


def with_twin(case: Case, steps: int = 2, **options: Any) -> tuple[Optimizer8bit, Optimizer8bit]:
    """An optimizer after some steps, and one of 32-bit states of the same values, over an equal parameter."""
    param = parameter(shape=SHAPE)
    mine = case.ours([param], **{"block_size": 64, **case.hyper, **options})
    train(mine, param, gradients(steps, SHAPE))
    theirs = case.ours([nn.Parameter(param.detach().clone())], state_bits=32, **{**case.hyper, **options})
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    return mine, theirs


def param_of(optimizer: Optimizer8bit) -> nn.Parameter:
    return optimizer.param_groups[0]["params"][0]


def state_of(optimizer: Optimizer8bit) -> dict[str, Any]:
    return optimizer.state[param_of(optimizer)]


def assert_equal_steps(mine: Optimizer8bit, theirs: Optimizer8bit, backend: str, seed: int = 5) -> None:
    """One step of each goes to the same parameter, up to rounding; states differ by what coding loses."""
    (ours, exact), signs = (param_of(mine), param_of(theirs)), signs_of(mine)
    before, grad = exact.detach().clone(), gradients(1, tuple(exact.shape), seed)[0]
    momentum = state_of(theirs).get("momentum_buffer", torch.zeros(())).abs()
    train(mine, ours, [grad])
    train(theirs, exact, [grad])
    if backend == "reference":
        assert torch.equal(ours, exact)
    else:
        # Momentum and gradient may cancel.
        terms = (exact - before).abs() + before.abs() + exact.abs() + momentum + mine.defaults["lr"] * grad.abs()
        assert ((ours - exact).abs() <= ULPS * terms).all()
    block_size = mine.param_groups[0]["block_size"]
    for name, signed in signs.items():
        codes, scale = (state_of(mine)[stored] for stored in stored_as(name))
        bound = scale.abs().repeat_interleave(block_size, 1)[:, : codes.shape[1]]
        error = (decode_state(codes, scale, signed, block_size) - state_of(theirs)[name]).abs()
        assert (error <= (HALF_GAP[signed] + ULPS) * bound).all(), name


ZEROED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "codes": lambda codes, scale: codes.zero_(),
    "codes and scale": lambda codes, scale: (codes.zero_(), scale.zero_()),
    "scale": lambda codes, scale: scale.zero_(),
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("way", ZEROED)
@pytest.mark.parametrize("name", ANY_SHAPE)
@pytest.mark.slow_interpreted
def test_a_zeroed_state_is_zero(name: str, way: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the states by itself, signed or not, and all together."""
    use(monkeypatch, backend)
    case = STATEFUL[name]
    mine, _ = with_twin(case)
    names = list(signs_of(mine))
    for chosen in [*([each] for each in names), *([names] if len(names) > 1 else [])]:
        mine, theirs = with_twin(case)
        for each in chosen:
            assert state_of(mine)[f"{each}_codes"].any() and state_of(theirs)[each].any()
            ZEROED[way](*(state_of(mine)[stored] for stored in stored_as(each)))
            state_of(theirs)[each].zero_()
            assert not mine.dequantized_state(param_of(mine))[each].any()
        assert_equal_steps(mine, theirs, backend)


@pytest.mark.sampled(4)
def test_new_tensors_of_zeros_are_zero(any_shape: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As zeros_like makes them of every state, whatever it is."""
    use(monkeypatch, backend)
    mine, theirs = with_twin(any_shape)
    for optimizer in (mine, theirs):
        state = state_of(optimizer)
        for name, value in state.items():
            if name != "step":
                state[name] = torch.zeros_like(value)
    assert_equal_steps(mine, theirs, backend)


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda state, keep: state.masked_fill(~keep, 0),
    "product": lambda state, keep: state * keep,
    "where": lambda state, keep: torch.where(keep, state, torch.zeros_like(state)),
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("way", MASKS)
@pytest.mark.slow_interpreted
def test_a_mask_zeroes_what_it_masks(any_shape: Case, way: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pruning does it to a state of the parameter's shape: whole blocks, and the largest of some."""
    use(monkeypatch, backend)
    mine, theirs = with_twin(any_shape)
    keep = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[3], keep[5, 64:128] = False, False
    for name in signs_of(mine):
        state_of(mine)[f"{name}_codes"] = MASKS[way](state_of(mine)[f"{name}_codes"], keep)
        state_of(theirs)[name] = MASKS[way](state_of(theirs)[name], keep)
        assert torch.equal(mine.dequantized_state(param_of(mine))[name], state_of(theirs)[name])
    assert_equal_steps(mine, theirs, backend)


def replaced(optimizer: Optimizer8bit, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the rows of a parameter and of every state, as Gaussian splatting adds and drops points."""
    old, state = param_of(optimizer), state_of(optimizer)
    new = nn.Parameter(change(old.detach()))
    del optimizer.state[old]
    optimizer.state[new] = {name: value if name == "step" else change(value) for name, value in state.items()}
    optimizer.param_groups[0]["params"][0] = new


@pytest.mark.sampled(7)
@pytest.mark.parametrize("change", ["rows of zeros", "rows dropped", "rows in another order"])
@pytest.mark.slow_interpreted
def test_rows_come_and_go_with_those_of_codes_and_scales(
    any_shape: Case, change: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, backend)
    mine, theirs = with_twin(any_shape)
    keep = torch.arange(SHAPE[0]) % 3 != 1
    order = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(0))
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "rows of zeros": lambda value: torch.cat([value, value.new_zeros(9, *value.shape[1:])]),
        "rows dropped": lambda value: value[keep],
        "rows in another order": lambda value: value[order],
    }
    for optimizer in (mine, theirs):
        replaced(optimizer, changes[change])
    assert state_of(mine)[f"{next(iter(signs_of(mine)))}_scale"].shape == (len(param_of(mine)), BLOCKS[1])
    assert_equal_steps(mine, theirs, backend)
    assert_equal_steps(mine, copied_in_full(mine), backend, seed=6)


def copied_in_full(optimizer: Optimizer8bit) -> Optimizer8bit:
    """A new twin."""
    options = {name: value for name, value in optimizer.defaults.items() if name != "state_bits"}
    kind: Any = type(optimizer)
    twin = kind([nn.Parameter(param_of(optimizer).detach().clone())], **options, state_bits=32)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin


# States in full, beside codes


@pytest.mark.sampled(7)
@pytest.mark.parametrize("which", ["one", "all"])
@pytest.mark.parametrize("kind", ["zeros", "numbers", "bfloat16", "float64", "strided"])
@pytest.mark.slow_interpreted
def test_a_state_put_in_full_is_adopted_at_the_next_step(
    any_shape: Case, which: str, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gaussian splatting resets the opacity. Then it is as if its codes had been put there."""
    use(monkeypatch, backend)
    mine, _ = with_twin(any_shape)
    signs = signs_of(mine)
    written, expected = state_of(mine), copy.deepcopy(mine)
    for i, name in enumerate(list(signs)[: 1 if which == "one" else None]):
        value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        value = value if signs[name] else value.square()
        value = {"zeros": torch.zeros_like, "bfloat16": Tensor.bfloat16, "float64": Tensor.double}.get(
            kind, lambda each: each
        )(value)
        written[name] = value.t().contiguous().t() if kind == "strided" else value
        pair = encode_state(value.float(), signs[name], 64, backend=backend)
        state_of(expected).update(zip(stored_as(name), pair, strict=True))
    for optimizer in (mine, expected):
        train(optimizer, param_of(optimizer), gradients(1, SHAPE, 5))
    assert torch.equal(param_of(mine), param_of(expected))
    assert state_of(mine).keys() == state_of(expected).keys()
    assert not set(signs) & set(state_of(mine))
    assert all(torch.equal(value, state_of(expected)[name]) for name, value in state_of(mine).items())


def test_the_opacity_may_be_reset_as_gaussian_splatting_does() -> None:
    """Word for word: the state is moved to another parameter, with zeros under the names of torch.optim."""
    optimizer = opt8bit.Adam8bit([{"params": [parameter(shape=SHAPE)], "name": "opacity"}], lr=0.05)
    train(optimizer, param_of(optimizer), gradients(3, SHAPE))
    tensor = torch.full(SHAPE, 0.01)
    for group in optimizer.param_groups:
        if group["name"] == "opacity":
            stored_state: Any = optimizer.state.get(group["params"][0], None)
            stored_state["exp_avg"] = torch.zeros_like(tensor)
            stored_state["exp_avg_sq"] = torch.zeros_like(tensor)
            del optimizer.state[group["params"][0]]
            group["params"][0] = nn.Parameter(tensor.requires_grad_(True))
            optimizer.state[group["params"][0]] = stored_state
    fresh = opt8bit.Adam8bit([nn.Parameter(tensor.detach().clone())], lr=0.05)
    for each in (optimizer, fresh):
        param_of(each).grad = torch.ones(SHAPE)
    fresh.step()
    state_of(fresh)["step"].fill_(3)
    fresh_param = param_of(fresh)
    with torch.no_grad():
        fresh_param.fill_(0.01)
    for name in ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"):
        state_of(fresh)[name].zero_()
    for each in (optimizer, fresh):
        each.step()
    assert torch.equal(param_of(optimizer), fresh_param) and state_of(optimizer)["step"] == 4
    assert set(state_of(optimizer)) == set(state_of(fresh))


def test_where_all_are_in_full_bits_are_decided_again() -> None:
    mine, theirs = with_twin(STATEFUL["AdamW8bit weight decay"])
    param: Any = param_of(mine)
    param.state_bits = 32
    for name in ("exp_avg", "exp_avg_sq"):
        state_of(mine)[name] = state_of(theirs)[name].clone()
    for optimizer in (mine, theirs):
        train(optimizer, param_of(optimizer), gradients(1, SHAPE, 5))
    assert set(state_of(mine)) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(param_of(mine), param_of(theirs))


def snapshot(optimizer: Optimizer8bit) -> tuple[list[Tensor], list[dict[str, Any]]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [param.detach().clone() for param in params], [copy.deepcopy(dict(optimizer.state[p])) for p in params]


def assert_unchanged(optimizer: Optimizer8bit, before: tuple[list[Tensor], list[dict[str, Any]]]) -> None:
    now = snapshot(optimizer)
    assert all(torch.equal(*pair) for pair in zip(now[0], before[0], strict=True))
    for state, kept in zip(now[1], before[1], strict=True):
        assert list(state) == list(kept)
        for name, value in kept.items():
            if isinstance(value, Tensor):
                assert state[name].dtype == value.dtype and state[name].stride() == value.stride()
                torch.testing.assert_close(state[name], value, rtol=0, atol=0, equal_nan=True)
            else:
                assert state[name] == value


LABEL = r"parameter 'second': state 'exp_avg(_sq)?', put beside codes,"
WRONG_IN_FULL: dict[str, tuple[str, Any, str]] = {
    "shape": ("exp_avg", torch.zeros(24, 301), rf"{LABEL} must be dense and have shape \(24, 300\), .* \(24, 301\)"),
    "NaN": ("exp_avg", torch.full(SHAPE, torch.nan), f"{LABEL} must be finite"),
    "infinite": ("exp_avg_sq", torch.full(SHAPE, torch.inf), f"{LABEL} must be finite"),
    "negative": ("exp_avg_sq", torch.full(SHAPE, -1.0), f"{LABEL} must not be negative, got -1.0"),
    "integers": ("exp_avg", torch.zeros(SHAPE, dtype=torch.int64), f"{LABEL} must be a plain tensor of real numbers"),
    "complex": ("exp_avg", torch.zeros(SHAPE) * 1j, f"{LABEL} must be a plain tensor of real numbers"),
    "a number": ("exp_avg", 0.0, f"{LABEL} must be a plain tensor of real numbers, got a float"),
    "sparse": ("exp_avg", torch.zeros(SHAPE).to_sparse(), f"{LABEL} must be dense"),
}
WAY_OUT = (
    "put them in full, of the new shape, under their names in torch.optim into state.p., and they are coded again; "
    "or delete state.p., and they begin at zero"
)
CODES = torch.zeros(SHAPE, dtype=torch.uint8)
WRONG_CODES: dict[str, tuple[str, Any, str]] = {
    "codes of another shape": (
        "exp_avg_codes",
        CODES[:23],
        rf"'exp_avg_codes' must be of shape \(24, 300\).*{WAY_OUT}",
    ),
    "codes of another dtype": ("exp_avg_codes", CODES.float(), f"'exp_avg_codes' must be .*torch.uint8.*{WAY_OUT}"),
    "codes in another order": ("exp_avg_codes", CODES.t().contiguous().t(), f"'exp_avg_codes' must be .*{WAY_OUT}"),
    "scale of another shape": (
        "exp_avg_sq_scale",
        torch.zeros(24, 1),
        rf"with block_size 64, state 'exp_avg_sq_scale' must be of shape \(24, 5\), .*{WAY_OUT}",
    ),
    "scale of another dtype": ("exp_avg_scale", torch.zeros(BLOCKS).double(), f"'exp_avg_scale' must be .*{WAY_OUT}"),
    "scale elsewhere": ("exp_avg_scale", torch.zeros(BLOCKS, device="meta"), f"'exp_avg_scale' must be .*{WAY_OUT}"),
    "codes that are none": ("exp_avg_codes", None, r"'second', of shape \(24, 300\), lacks the state 'exp_avg_codes'"),
    "codes that are a list": ("exp_avg_codes", [0], "state 'exp_avg_codes' must be a plain tensor, got a list"),
    "a scale in float16": ("exp_avg_scale", torch.zeros(BLOCKS).half(), f"'exp_avg_scale' must be .*{WAY_OUT}"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("wrong", [*WRONG_IN_FULL, *WRONG_CODES])
def test_what_cannot_be_a_state_is_refused_and_nothing_changes(
    wrong: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, backend)
    named = [("first", parameter(0, SHAPE)), ("second", parameter(1, SHAPE))]
    optimizer = opt8bit.AdamW8bit(named, block_size=64)
    params = [param for _, param in named]
    for param in params:
        param.grad = gradients(1, SHAPE)[0]
    optimizer.step()
    good = dict(optimizer.state[params[1]])
    name, value, message = {**WRONG_IN_FULL, **WRONG_CODES}[wrong]
    optimizer.state[params[1]][name] = value
    before = None if getattr(value, "is_meta", False) or getattr(value, "is_sparse", False) else snapshot(optimizer)
    first = params[0].detach().clone()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    if before:
        assert_unchanged(optimizer, before)
    assert torch.equal(params[0], first) and optimizer.state[params[1]][name] is value
    optimizer.state[params[1]] = good
    optimizer.step()


@pytest.mark.parametrize("way_out", ["in full", "deleted"])
def test_after_a_change_of_shape_there_are_two_ways_out(way_out: str) -> None:
    """Those that the refusal names."""
    param = parameter(shape=SHAPE)
    optimizer = opt8bit.AdamW8bit([param], block_size=64, min_8bit_size=0)
    train(optimizer, param, gradients(2, SHAPE))
    param.grad = None
    param.data = param.data[:, :100].clone()
    grad = gradients(1, (24, 100), 5)
    with pytest.raises(ValueError, match=WAY_OUT):
        train(optimizer, param, grad)
    other = opt8bit.AdamW8bit([nn.Parameter(param.detach().clone())], block_size=64, min_8bit_size=0)
    if way_out == "in full":
        cut = {k: v[:, :100].clone() for k, v in optimizer.dequantized_state(param).items() if k != "step"}
        optimizer.state[param].update(cut)
        pairs = {stored: part for name, value in cut.items() for stored, part in coded(name, value).items()}
        other.state[param_of(other)] = {"step": torch.tensor(2.0), **pairs}
    else:
        del optimizer.state[param]
    train(optimizer, param, grad)
    train(other, param_of(other), grad)
    assert torch.equal(param, param_of(other))
    assert optimizer.state[param]["exp_avg_codes"].shape == (24, 100)


def coded(name: str, value: Tensor) -> dict[str, Tensor]:
    return dict(zip(stored_as(name), encode_state(value, name != "exp_avg_sq", 64), strict=True))


# What others keep among the states


def others_own() -> dict[str, Any]:
    return {
        "slow_buffer": torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)),
        "mask": torch.ones(3, dtype=torch.bool),
        "note": "kept",
        "history": [1, {"loss": 0.5}],
    }


def assert_kept(state: dict[str, Any]) -> None:
    for name, value in others_own().items():
        if isinstance(value, Tensor):
            assert state[name].dtype == value.dtype and torch.equal(state[name], value)
        else:
            assert state[name] == value


@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.slow_interpreted
def test_what_others_keep_survives_steps_and_changes_none(
    stateful: Case, when: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, backend)
    results = []
    for has_others in (True, False):
        param = parameter(shape=SHAPE)
        optimizer = stateful.ours([param], **stateful.hyper)
        for number, grad in enumerate(gradients(4, SHAPE)):
            if has_others and number == (0 if when == "before the first step" else 2):
                optimizer.state[param].update(others_own())
            train(optimizer, param, [grad])
        results.append((param.detach(), dict(optimizer.state[param])))
    (mine, state), (theirs, plain) = results
    assert_kept(state)
    assert torch.equal(mine, theirs) and set(state) == {*plain, *others_own()}
    assert all(torch.equal(state[name], value) for name, value in plain.items())


def test_a_tensor_of_others_is_theirs_to_replace() -> None:
    """It may have another shape then: it is no part of what a step is planned for."""
    param = parameter(shape=SHAPE)
    optimizer = opt8bit.AdamW8bit([param])
    for number in range(3):
        optimizer.state[param]["slow_buffer"] = kept = torch.full((number,), 1.0)
        train(optimizer, param, gradients(1, SHAPE))
        assert optimizer.state[param]["slow_buffer"] is kept
    optimizer.state[param].pop("slow_buffer")
    train(optimizer, param, gradients(1, SHAPE))
    assert "slow_buffer" not in optimizer.state[param] and optimizer.state[param]["step"] == 4


@pytest.mark.parametrize(
    ("way", "options"),
    [
        *((way, {}) for way in ("state dict", "weights_only", "deepcopy", "pickle")),
        *(
            (way, options)
            for way in ("state dict", "weights_only")
            for options in ({"block_size": 128}, {"state_bits": 32})
        ),
    ],
    ids=str,
)
def test_what_others_keep_is_saved_and_loaded(stateful: Case, way: str, options: dict[str, Any]) -> None:
    param = parameter(shape=SHAPE)
    optimizer = stateful.ours([param], **stateful.hyper)
    train(optimizer, param, gradients(2, SHAPE))
    optimizer.state[param].update(others_own())
    if way in ("deepcopy", "pickle"):
        pair = (optimizer, param)
        other, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    else:
        saved = optimizer.state_dict()
        if way == "weights_only":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        copied = nn.Parameter(param.detach().clone())
        other = stateful.ours([copied], **{**stateful.hyper, **options})
        other.load_state_dict(saved)
    assert_kept(other.state[copied])
    assert other.state[copied]["slow_buffer"].data_ptr() != optimizer.state[param]["slow_buffer"].data_ptr()
    assert other.state[copied]["history"] is not optimizer.state[param]["history"]
    train(other, copied, gradients(1, SHAPE, 5))
    assert_kept(other.state[copied])
    if not options:
        train(optimizer, param, gradients(1, SHAPE, 5))
        assert torch.equal(copied, param)


def test_what_is_of_another_optimizer_is_still_refused() -> None:
    param = parameter(shape=SHAPE)
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1, SHAPE))
    for name in ("momentum_buffer", "square_avg_codes", "exp_avg_slow_scale", "sum_absmax", "qmap1"):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0][name] = torch.zeros(SHAPE)
        with pytest.raises(ValueError, match=f"has a state '{name}', but adamw has step, exp_avg"):
            optimizer.load_state_dict(saved)


# Reading


@pytest.mark.sampled(4)
def test_dequantized_states_are_what_a_step_starts_from(
    stateful: Case, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, backend)
    mine, theirs = with_twin(stateful)
    for optimizer in (mine, theirs):
        found = optimizer.dequantized_state(param_of(optimizer))
        assert set(found) == {"step", *signs_of(mine)} and found["step"] == 2
        for name, value in found.items():
            assert torch.equal(value, state_of(theirs)[name])
        addresses = {value.data_ptr() for value in state_of(optimizer).values()}
        assert not addresses & {value.data_ptr() for value in found.values()}


def test_there_are_none_before_the_first_step_nor_of_strangers() -> None:
    optimizer = opt8bit.AdamW8bit([param := parameter(shape=SHAPE)])
    assert optimizer.dequantized_state(param) == {} and not optimizer.state
    with pytest.raises(KeyError, match="does not have this parameter"):
        optimizer.dequantized_state(parameter(shape=SHAPE))


# Steps and parameters of other kinds


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["AdamW8bit weight decay", "SGD8bit momentum", "AdEMAMix8bit schedules"])
def test_a_step_may_have_one_dimension(name: str, bits: int) -> None:
    """As some versions of other optimizers count them; its dimension is dropped."""
    case, results = ANY_SHAPE[name], []
    for shape in ((), (1,), (1, 1)):
        param = parameter(shape=SHAPE)
        optimizer = case.ours([param], state_bits=bits, **case.hyper)
        train(optimizer, param, gradients(2, SHAPE))
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"] = torch.full(shape, 2.0)
        optimizer.load_state_dict(saved)
        assert optimizer.state[param]["step"].shape == () and optimizer.state[param]["step"] == 2
        train(optimizer, param, gradients(1, SHAPE, 5))
        results.append(param.detach())
    assert all(torch.equal(result, results[0]) for result in results)


FROZEN: dict[str, Callable[[], nn.Parameter]] = {
    **{
        str(dtype).removeprefix("torch."): lambda dtype=dtype: nn.Parameter(
            torch.ones(SHAPE).to(dtype), requires_grad=False
        )
        for dtype in (torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    "sparse": lambda: nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False),
    "meta": lambda: nn.Parameter(torch.ones(SHAPE, device="meta"), requires_grad=False),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters_of_any_kind_are_skipped(stateful: Case, kind: str) -> None:
    """As they lie in a model that is quantized but for a few layers, of which all parameters are handed over."""
    frozen, param, plain = FROZEN[kind](), parameter(shape=SHAPE), parameter(shape=SHAPE)
    optimizer = stateful.ours([("frozen", frozen), ("trained", param)], **stateful.hyper)
    optimizer.add_param_group({"params": [("later", FROZEN[kind]())]})
    train(optimizer, param, gradients(2, SHAPE))
    train(stateful.ours([plain], **stateful.hyper), plain, gradients(2, SHAPE))
    assert torch.equal(param, plain) and set(optimizer.state) == {param}
    if kind not in ("sparse", "meta"):
        assert torch.equal(frozen.float(), torch.ones(SHAPE))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert set(saved["state"]) == {1}


@pytest.mark.parametrize("kind", ["uint8", "int8", "float8_e4m3fn"])
def test_frozen_parameters_are_refused_by_name_with_a_gradient(kind: str) -> None:
    frozen, param = FROZEN[kind](), parameter(shape=SHAPE)
    optimizer = opt8bit.AdamW8bit([("body.trained", param), ("body.frozen", frozen)])
    param.grad, frozen.grad = torch.ones(SHAPE), torch.ones(SHAPE).to(frozen.dtype)
    before = param.detach().clone()
    message = rf"parameter 'body\.frozen': parameters must be one of .*, got torch\.{kind}"
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert torch.equal(param, before) and not optimizer.state
    frozen.grad = None
    optimizer.step()
    assert set(optimizer.state) == {param}


def test_parameters_to_train_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"parameters must be one of .*, got torch\.float8_e4m3fn"):
        opt8bit.AdamW8bit([nn.Parameter(torch.ones(SHAPE).to(torch.float8_e4m3fn))])
