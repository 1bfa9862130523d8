"""What every optimizer must do; one enters by its row in the table."""

import copy
import io
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import opt8bit
import opt8bit.quant
from opt8bit.optim.base import Optimizer8bit

SHAPE = (32, 300)  # 9600 elements, with a short block at the end of each row


class Case(NamedTuple):
    ours: type[Optimizer8bit]
    torchs: type[torch.optim.Optimizer]
    hyper: dict[str, Any]


def adam_cases(ours: type[Optimizer8bit], torchs: type[torch.optim.Optimizer]) -> dict[str, Case]:
    variants: dict[str, dict[str, Any]] = {
        "defaults": {},
        "weight decay": {"weight_decay": 0.1},
        "no weight decay": {"weight_decay": 0.0},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "amsgrad": {"amsgrad": True, "weight_decay": 0.05},
        "amsgrad, maximize": {"amsgrad": True, "maximize": True},
        "betas, eps": {"betas": (0.8, 0.95), "eps": 1e-3},
        "betas of zero": {"betas": (0.0, 0.0)},
        "tensor lr": {"lr": torch.tensor(0.01, dtype=torch.float64)},
    }
    return {f"{ours.__name__} {name}": Case(ours, torchs, hyper) for name, hyper in variants.items()}


CASES: dict[str, Case] = {
    **adam_cases(opt8bit.AdamW8bit, torch.optim.AdamW),
    **adam_cases(opt8bit.Adam8bit, torch.optim.Adam),
    "Adam8bit decoupled": Case(
        opt8bit.Adam8bit, torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}
    ),
    **{
        f"SGD8bit {name}": Case(opt8bit.SGD8bit, torch.optim.SGD, hyper)
        for name, hyper in {
            "defaults": {},
            "momentum": {"momentum": 0.9},
            "dampening": {"momentum": 0.9, "dampening": 0.5},
            "nesterov": {"momentum": 0.9, "nesterov": True},
            "weight decay": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.1},
            "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "no momentum, weight decay": {"weight_decay": 0.1},
            "tensor lr": {"momentum": 0.9, "lr": torch.tensor(0.01, dtype=torch.float64)},
        }.items()
    },
}
STATEFUL = {
    name: CASES[name]
    for name in ("AdamW8bit weight decay", "AdamW8bit amsgrad", "Adam8bit weight decay", "SGD8bit momentum")
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=STATEFUL)
def stateful(request: pytest.FixtureRequest) -> Case:
    return STATEFUL[request.param]


def parameter(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> list[Tensor]:
    """Gradients whose size varies over six decades, from one element to the next."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(shape, generator=generator).mul(3).clamp(-7, 7).exp()
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def train(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()


def use(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("OPT8BIT_BACKEND", backend)


# Each operation of a rule rounds once, by half an ulp of its terms or less; no rule has more than 16 on the way to
# a result. The terms are states, the gradient with its decay (no more than the parameter), and their squares.
ULPS = 16 * 2**-24


def test_32_bit_states_equal_torch(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, backend)
    ours, theirs = parameter(), parameter()
    mine = case.ours([ours], state_bits=32, **case.hyper)
    reference = case.torchs([theirs], **case.hyper)
    for grad in gradients(5):
        before = theirs.detach().clone()
        old = {name: value.abs() for name, value in reference.state[theirs].items() if value is not None}
        with torch.no_grad():
            ours.copy_(theirs)
        for name, value in reference.state[theirs].items():
            if mine.state[ours] and name in mine.state[ours]:
                mine.state[ours][name].copy_(value)
        train(mine, ours, [grad])
        train(reference, theirs, [grad])
        moved = (theirs - before).abs()
        force = grad.abs() + before.abs()
        if case.ours is opt8bit.SGD8bit:  # whose terms may cancel
            moved += float(mine.defaults["lr"]) * (force + old.get("momentum_buffer", 0))
        tolerance = ULPS * (moved + before.abs() + theirs.abs())
        assert ((ours - theirs).abs() <= tolerance).all()
        for name, value in reference.state[theirs].items():
            if value is not None and value.dim():
                terms = old.get(name, 0) + force * (1 + force)
                assert ((mine.state[ours][name] - value).abs() <= ULPS * terms).all(), name


def test_the_first_8_bit_step_is_torchs(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States begin at zero, which has a code: nothing is lost before the second step."""
    use(monkeypatch, backend)
    ours, theirs = parameter(), parameter()
    before = theirs.detach().clone()
    grads = gradients(1)
    train(case.ours([ours], **case.hyper), ours, grads)
    train(case.torchs([theirs], **case.hyper), theirs, grads)
    tolerance = ULPS * ((theirs - before).abs() + before.abs() + theirs.abs())
    assert ((ours - theirs).abs() <= tolerance).all()


HALF_GAP = {"exp_avg": 0.45 / 64, "momentum_buffer": 0.45 / 64, "exp_avg_sq": 0.45 / 128}
DECAY = {"exp_avg": 0.9, "momentum_buffer": 0.9, "exp_avg_sq": 0.999}


def decoded(optimizer: Optimizer8bit, param: Tensor, name: str) -> Tensor:
    signed = name != "exp_avg_sq"
    state = optimizer.state[param]
    return opt8bit.quant.dequantize_blockwise(
        state[name], state[f"{name}_absmax"], opt8bit.quant.dynamic_map(signed), 256
    )


@pytest.mark.parametrize("name", ["Adam8bit defaults", "SGD8bit momentum"])
def test_8_bit_states_track_torchs(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step adds half a gap times the block's absmax at most, and keeps ``decay`` of the error before.

    (Without weight decay the states depend on the gradients alone, which both get.)
    """
    use(monkeypatch, backend)
    case = CASES[name]
    ours, theirs = parameter(), parameter()
    mine, reference = case.ours([ours], **case.hyper), case.torchs([theirs], **case.hyper)
    bound: dict[str, Tensor] = {}
    for grad in gradients(20):
        train(mine, ours, [grad])
        train(reference, theirs, [grad])
        for state, half_gap in HALF_GAP.items():
            if state not in reference.state[theirs]:
                continue
            absmax = mine.state[ours][f"{state}_absmax"].repeat_interleave(256, 1)[:, : SHAPE[1]]
            rounding = 4 * 2**-24 * absmax
            bound[state] = DECAY[state] * bound.get(state, torch.zeros(SHAPE)) + half_gap * absmax + rounding
            error = (decoded(mine, ours, state) - reference.state[theirs][state]).abs()
            assert (error <= bound[state]).all()
            assert error.max() > 0


def test_8_bit_sgd_tracks_torch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step moves the parameter by lr times the buffer, whose error is bounded as above."""
    use(monkeypatch, backend)
    lr, momentum = 0.1, 0.9
    ours, theirs = parameter(), parameter()
    mine = opt8bit.SGD8bit([ours], lr=lr, momentum=momentum)
    reference = torch.optim.SGD([theirs], lr=lr, momentum=momentum)
    state_bound, bound = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for grad in gradients(20):
        train(mine, ours, [grad])
        train(reference, theirs, [grad])
        bound += lr * momentum * state_bound + 4 * 2**-24 * (theirs.abs() + lr * grad.abs())
        absmax = mine.state[ours]["momentum_buffer_absmax"].repeat_interleave(256, 1)[:, : SHAPE[1]]
        state_bound = momentum * state_bound + (HALF_GAP["momentum_buffer"] + 4 * 2**-24) * absmax
        assert ((ours - theirs).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(stateful: Case, kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From equal states a step's codes differ by one level at most, on few elements; parameters by rounding."""
    results = []
    for name in (kernels, "reference"):
        use(monkeypatch, name)
        param = parameter(dtype=dtype)
        optimizer = stateful.ours([param], **stateful.hyper)
        monkeypatch.setenv("OPT8BIT_BACKEND", "reference")
        train(optimizer, param, gradients(3))
        use(monkeypatch, name)
        train(optimizer, param, gradients(1, seed=9))
        results.append((param.detach().float(), optimizer.state[param]))
    (ours, mine), (theirs, reference) = results
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert ((ours - theirs).abs() <= ulp * theirs.abs() + ULPS).all()
    for name, value in reference.items():
        if value.dtype == torch.uint8:
            difference = (mine[name].int() - value.int()).abs()
            assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3
        else:
            torch.testing.assert_close(mine[name], value, rtol=ULPS, atol=0)


def test_instruction_sets_and_threads_give_the_same_bits(
    stateful: Case, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for name, count in (("scalar", 1), (kernels, 1), (kernels, 2), (kernels, 5)):
            use(monkeypatch, name)
            torch.set_num_threads(count)
            params = [parameter(0), parameter(1, (700, 64)), parameter(2, (3,)), parameter(3, (64, 1000))]
            optimizer = stateful.ours(params, **stateful.hyper)
            for seed in range(3):
                for param in params:
                    param.grad = gradients(1, tuple(param.shape), seed)[0]
                optimizer.step()
            states = [value for param in params for value in optimizer.state[param].values()]
            results.append([*params, *states])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_state_is_named_and_laid_out_as_documented(stateful: Case) -> None:
    param = parameter()
    optimizer = stateful.ours([param], **stateful.hyper)
    assert not optimizer.state[param]
    train(optimizer, param, gradients(2))
    state = optimizer.state[param]
    assert state["step"].item() == 2 and state["step"].dtype == torch.float32 and state["step"].dim() == 0
    names = {name for name in state if name != "step" and not name.endswith("_absmax")}
    reference = parameter()
    theirs = stateful.torchs([reference], **stateful.hyper)
    train(theirs, reference, gradients(1))
    assert names == set(theirs.state[reference]) - {"step"}
    for name in names:
        assert state[name].dtype == torch.uint8 and state[name].shape == SHAPE
        assert state[f"{name}_absmax"].dtype == torch.float32 and state[f"{name}_absmax"].shape == (32, 2)


@pytest.mark.parametrize(
    ("shape", "options", "bits"),
    [
        ((64, 64), {}, 8),
        ((64, 63), {}, 32),
        ((64, 63), {"min_8bit_size": 0}, 8),
        ((64, 64), {"min_8bit_size": 4097}, 32),
        ((64, 64), {"state_bits": 32}, 32),
        ((512, 15), {}, 32),
        ((512, 4, 4), {}, 8),
        ((10_000,), {}, 32),
        ((2**20,), {}, 8),
        ((), {"min_8bit_size": 0}, 32),
    ],
)
def test_which_tensors_take_8_bits(shape: tuple[int, ...], options: dict[str, Any], bits: int) -> None:
    param = nn.Parameter(torch.zeros(shape))
    optimizer = opt8bit.AdamW8bit([param], **options)
    train(optimizer, param, [torch.ones(shape)])
    assert optimizer.state[param]["exp_avg"].dtype == (torch.uint8 if bits == 8 else torch.float32)
    assert optimizer.state[param]["exp_avg"].shape == shape


def test_a_parameters_own_state_bits_win() -> None:
    param = parameter()
    param.state_bits = 32
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def test_groups_have_their_own_options() -> None:
    params = [parameter(seed) for seed in range(3)]
    optimizer = opt8bit.AdamW8bit(
        [
            {"params": [params[0]], "lr": 0.5},
            {"params": [params[1]], "state_bits": 32, "weight_decay": 0.0},
            {"params": [params[2]], "block_size": 64, "amsgrad": True},
        ]
    )
    alone = [parameter(seed) for seed in range(3)]
    options = [{"lr": 0.5}, {"state_bits": 32, "weight_decay": 0.0}, {"block_size": 64, "amsgrad": True}]
    for grad in gradients(3):
        for param in params:
            param.grad = grad
        optimizer.step()
    for param, single, option in zip(params, alone, options, strict=True):
        train(opt8bit.AdamW8bit([single], **option), single, gradients(3))
        assert torch.equal(param, single)
    assert optimizer.state[params[2]]["exp_avg_absmax"].shape == (32, 5)


def test_parameters_without_gradient_are_skipped(case: Case) -> None:
    params = [parameter(0), parameter(1), nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.tensor(1.0))]
    before = params[1].detach().clone()
    optimizer = case.ours(params, **case.hyper)
    optimizer.step()
    assert not any(optimizer.state.values())
    for param in (params[0], params[2], params[3]):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    assert params[3].item() != 1.0


def test_gradients_may_come_and_go(stateful: Case) -> None:
    params, alone = [parameter(0), parameter(1)], [parameter(0), parameter(1)]
    optimizer = stateful.ours(params, **stateful.hyper)
    singles = [stateful.ours([param], **stateful.hyper) for param in alone]
    for number, grad in enumerate(gradients(6)):
        for param, single, optimizer_alone, present in zip(
            params, alone, singles, (number % 2, number > 2), strict=True
        ):
            param.grad = grad.clone() if present else None
            if present:
                train(optimizer_alone, single, [grad])
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, alone, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels last", "expanded gradient"])
def test_other_layouts_are_updated_in_place(stateful: Case, layout: str) -> None:
    dense, grad = torch.randn(32, 20, 4, 4), torch.randn(32, 20, 4, 4)
    if layout == "transposed":
        storage = dense.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        storage = torch.zeros(32, 20, 4, 8)[..., ::2].copy_(dense)
    elif layout == "channels last":
        storage = dense.to(memory_format=torch.channels_last)
    else:
        storage, grad = dense.clone(), grad[:1].expand(32, 20, 4, 4)
    param, plain = nn.Parameter(storage), nn.Parameter(dense.clone())
    address, strides = param.data_ptr(), param.stride()
    train(stateful.ours([param], **stateful.hyper), param, [grad] * 3)
    train(stateful.ours([plain], **stateful.hyper), plain, [grad.contiguous()] * 3)
    assert param.data_ptr() == address and param.stride() == strides
    assert torch.equal(param, plain)


def test_closure_is_run_with_gradients() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first and not param.grad.isnan().any()


def copies(optimizer: Optimizer8bit, param: nn.Parameter) -> dict[str, tuple[Optimizer8bit, nn.Parameter]]:
    """The optimizer and its parameter, carried over in every way there is."""
    deep = copy.deepcopy((optimizer, param))
    pickled = pickle.loads(pickle.dumps((optimizer, param)))
    other = nn.Parameter(param.detach().clone())
    loaded = type(optimizer)([other], **{k: v for k, v in optimizer.defaults.items()})
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return {"deepcopy": deep, "pickle": pickled, "state dict": (loaded, other)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_continues_bit_for_bit(stateful: Case, dtype: torch.dtype) -> None:
    param = parameter(dtype=dtype)
    optimizer = stateful.ours([param], block_size=64, **stateful.hyper)
    train(optimizer, param, gradients(3))
    carried = copies(optimizer, param)
    train(optimizer, param, gradients(3, seed=7))
    for name, (other, other_param) in carried.items():
        train(other, other_param, gradients(3, seed=7))
        assert torch.equal(other_param, param), name
        for key, value in optimizer.state[param].items():
            assert other.state[other_param][key].dtype == value.dtype, (name, key)
            assert torch.equal(other.state[other_param][key], value), (name, key)


def test_loading_leaves_the_state_dict_alone_and_calls_hooks() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    calls = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state_dict: calls.append(state_dict["state"][0]["exp_avg"].dtype)
    )
    optimizer.register_load_state_dict_post_hook(lambda loaded: calls.append(loaded.state[param]["exp_avg"].dtype))
    optimizer.load_state_dict(saved)
    train(optimizer, param, gradients(2))
    assert calls == [torch.uint8, torch.uint8]
    for name, value in kept["state"][0].items():
        assert torch.equal(saved["state"][0][name], value)


def damage(name: str, value: Any) -> Any:
    def change(state_dict: dict[str, Any]) -> None:
        state_dict["state"][0][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            damage("exp_avg", torch.zeros(32, 299, dtype=torch.uint8)),
            r"'exp_avg' must have shape \(32, 300\)",
        ),
        (damage("exp_avg", torch.zeros(SHAPE)), "'exp_avg' must .* be torch.uint8, got .* torch.float32"),
        (damage("exp_avg_absmax", torch.zeros(32, 1)), r"'exp_avg_absmax' must have shape \(32, 2\)"),
        (damage("step", torch.zeros(3)), "'step' must have shape"),
        (damage("exp_avg_sq", 3), "'exp_avg_sq' must be a tensor, got int"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(change: Any, message: str) -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(2))
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    change(damaged)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, value in before["state"][0].items():
        assert torch.equal(after["state"][0][name], value)
    optimizer.load_state_dict(before)


def test_a_foreign_state_is_refused() -> None:
    param = parameter()
    theirs = torch.optim.AdamW([param])
    train(theirs, param, gradients(1))
    with pytest.raises(ValueError, match="parameter group 0 is not one of AdamW8bit: it has no block_size"):
        opt8bit.AdamW8bit([param]).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": torch.zeros(2)}, "Tensor lr must be 1-element"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"block_size": 15}, "block_size must be an integer from 16 to 16384, got 15"),
        ({"block_size": 16385}, "got 16385"),
        ({"block_size": 256.0}, "got 256.0"),
        ({"min_8bit_size": -1}, "min_8bit_size must be a non-negative integer, got -1"),
        ({"state_bits": 4}, "state_bits must be 8 or 32, got 4"),
        ({"foreach": True}, "foreach must be left out.* got True"),
        ({"capturable": True}, "capturable must be left out.* got True"),
        ({"differentiable": True}, "differentiable must be left out.* got True"),
    ],
)
def test_bad_hyper_parameters_are_refused(stateful: Case, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stateful.ours([parameter()], **hyper)
    with pytest.raises(ValueError, match=message):
        stateful.ours([parameter()]).add_param_group({"params": [parameter(1)], **hyper})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: opt8bit.AdamW8bit([parameter()], betas=(1.0, 0.9)),
            ValueError,
            "beta parameter at index 0: 1.0",
        ),
        (
            lambda: opt8bit.AdamW8bit([parameter()], betas=(0.9, -0.1)),
            ValueError,
            "beta parameter at index 1",
        ),
        (lambda: opt8bit.AdamW8bit([parameter()], eps=-1e-8), ValueError, "Invalid epsilon value: -1e-08"),
        (lambda: opt8bit.SGD8bit([parameter()], momentum=-1), ValueError, "Invalid momentum value: -1"),
        (lambda: opt8bit.SGD8bit([parameter()], nesterov=True), ValueError, "Nesterov momentum requires"),
        (
            lambda: opt8bit.AdamW8bit([parameter()], amount=3),
            TypeError,
            "unexpected keyword argument 'amount'",
        ),
        (
            lambda: opt8bit.AdamW8bit([nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)]),
            TypeError,
            "got torch.int32",
        ),
        (lambda: opt8bit.AdamW8bit([]), ValueError, "empty parameter list"),
    ],
)
def test_bad_arguments_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_sparse_gradient_is_refused_before_anything_is_written(stateful: Case) -> None:
    params = [parameter(), parameter(1)]
    before = [param.detach().clone() for param in params]
    optimizer = stateful.ours(params, **stateful.hyper)
    params[0].grad = torch.ones(SHAPE)
    params[1].grad = torch.ones(SHAPE).to_sparse()
    with pytest.raises(RuntimeError, match=r"must be dense, got layout torch\.sparse_coo"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


def test_block_size_cannot_change_during_training() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    optimizer.param_groups[0]["block_size"] = 64
    with pytest.raises(ValueError, match=r"with block_size 64, state .*_absmax"):
        train(optimizer, param, gradients(1))


def test_a_block_size_beyond_the_kernels_is_refused_wherever_it_comes_from() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["block_size"] = 2**20
    with pytest.raises(ValueError, match="from 16 to 16384, got 1048576"):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["block_size"] = 2**20
    with pytest.raises(ValueError, match="from 16 to 16384, got 1048576"):
        train(optimizer, param, gradients(1))


@pytest.mark.parametrize(
    ("bits", "change"),
    [
        (8, lambda data: torch.randn(32, 400)),
        (8, lambda data: torch.randn(9, 4)),
        (32, lambda data: torch.randn(32, 400)),
        (32, lambda data: torch.randn(9, 4)),
        (32, lambda data: data.double()),
    ],
)
def test_a_parameter_whose_data_changed_is_refused(bits: int, change: Any) -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param], state_bits=bits)
    train(optimizer, param, gradients(2))
    param.grad = None
    param.data = change(param.data)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"parameter 0, of shape .* state 'exp_avg' must be of shape"):
        train(optimizer, param, [torch.ones(param.shape)])
    assert torch.equal(param, before)


def test_states_that_were_loaded_are_contiguous(stateful: Case) -> None:
    params = [parameter(), parameter()]
    optimizers = [stateful.ours([param], **stateful.hyper) for param in params]
    train(optimizers[0], params[0], gradients(2))
    saved = optimizers[0].state_dict()
    saved["state"][0] = {name: value.t().contiguous().t() for name, value in saved["state"][0].items()}
    with torch.no_grad():
        params[1].copy_(params[0])
    optimizers[1].load_state_dict(saved)
    for optimizer, param in zip(optimizers, params, strict=True):
        train(optimizer, param, gradients(1, seed=5))
    assert torch.equal(*params)


def test_a_state_added_later_is_stored_as_the_others() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    param.state_bits = 32
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, param, gradients(1))
    assert optimizer.state[param]["max_exp_avg_sq"].dtype == torch.uint8


def test_fused_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, exact = parameter(), nn.Parameter(parameter().detach().double())
    with pytest.raises(ValueError, match=r"fused=True, but no .* serve adamw for a parameter of torch\.float64"):
        train(opt8bit.AdamW8bit([exact], fused=True), exact, gradients(1))
    use(monkeypatch, "reference")
    with pytest.raises(ValueError, match="fused=True, but no compiled kernels"):
        train(opt8bit.AdamW8bit([plain], fused=True), plain, gradients(1))


def test_float64_equals_torch(case: Case) -> None:
    ours, theirs = (nn.Parameter(parameter().detach().double()) for _ in range(2))
    train(case.ours([ours], **case.hyper), ours, gradients(3))
    train(case.torchs([theirs], **case.hyper), theirs, gradients(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_zero_gradients_never_move_a_parameter(stateful: Case) -> None:
    """Bins of equal width would code an exact 0 as a small number, and such parameters would drift."""
    hyper = {**stateful.hyper, "weight_decay": 0.0}
    param = parameter(shape=(16, 512))
    before = param.detach().clone()
    optimizer = stateful.ours([param], **hyper)
    for seed in range(100):
        grad = gradients(1, (16, 512), seed)[0]
        grad[:, ::3] = 0
        train(optimizer, param, [grad])
    assert torch.equal(param[:, ::3], before[:, ::3])
    assert not torch.equal(param[:, 1::3], before[:, 1::3])


def test_a_learning_rate_schedule_is_followed(stateful: Case) -> None:
    param = parameter()
    optimizer = stateful.ours([param], **stateful.hyper)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    train(optimizer, param, gradients(1))
    schedule.step()
    before = param.detach().clone()
    train(optimizer, param, gradients(1))
    assert torch.equal(param, before)
