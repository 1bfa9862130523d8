"""What every optimizer must do; one enters by its row in the table."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from cases import CASES, SHAPE, STATEFUL, Case, assert_states_agree, gradients, parameter, train, use
from torch import Tensor, nn

import opt8bit
import opt8bit.quant
from opt8bit.backends import get
from opt8bit.optim.base import Optimizer8bit


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# Each operation of a rule rounds once, by half an ulp of its terms or less; no rule has more than 16 on the way to
# a result. The terms are states, the gradient with its decay (no more than the parameter), and their squares.
ULPS = 16 * 2**-24


def oracle_states(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours in float64, by the oracle's names."""
    result = {name: value.double() for name, value in state.items() if name != "step"}
    if "variance" in result:  # where torch.optim.RMSprop keeps the mean square
        result["square_avg"] = result.pop("variance") + result["grad_avg"] ** 2
    return result


@pytest.mark.slow_interpreted
def test_32_bit_states_equal_the_oracle(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step from the same states, against the oracle in float64."""
    use(monkeypatch, backend)
    ours = parameter()
    theirs = nn.Parameter(ours.detach().double())
    mine, oracle = case.ours([ours], state_bits=32, **case.hyper), case.oracle([theirs], **case.hyper)
    for grad in gradients(5):
        before = ours.detach().double()
        old = oracle_states(mine.state[ours])
        with torch.no_grad():
            theirs.copy_(before)
            for name, value in old.items():
                oracle.state[theirs][name].copy_(value)
        train(mine, ours, [grad])
        train(oracle, theirs, [grad])
        force = grad.abs() + before.abs()
        momentum = old["momentum_buffer"].abs() if "momentum_buffer" in old else 0
        moved = (theirs - before).abs()
        if case.ours in (opt8bit.SGD8bit, opt8bit.LARS8bit):  # whose terms may cancel
            moved += float(mine.defaults["lr"]) * force + momentum
        if case.ours is opt8bit.Lion8bit:  # whose sign may be that of rounding alone
            beta1 = mine.defaults["betas"][0]
            average = old.get("exp_avg", 0) * beta1 + (-grad if mine.defaults["maximize"] else grad) * (1 - beta1)
            is_near_zero = average.abs() <= ULPS * ((old["exp_avg"].abs() if old else 0) + grad.abs())
            moved += is_near_zero * float(mine.defaults["lr"]) / ULPS
        quotient = torch.zeros(())
        if case.ours is opt8bit.RMSprop8bit:  # where a gradient and its decay may cancel before a division
            square_avg, grad_avg = (oracle.state[theirs].get(name, 0) for name in ("square_avg", "grad_avg"))
            quotient = force / ((square_avg - grad_avg * grad_avg).sqrt() + mine.defaults["eps"])
            moved += float(mine.defaults["lr"]) * (quotient + momentum)
        tolerance = ULPS * (moved + before.abs() + theirs.abs())
        assert ((ours - theirs).abs() <= tolerance).all()
        for name, value in oracle_states(mine.state[ours]).items():
            exact = oracle.state[theirs][name]
            terms = (old[name].abs() if name in old else 0) + exact.abs() + force * (1 + force) + quotient
            assert ((value - exact).abs() <= ULPS * terms).all(), name


@pytest.mark.sampled(4)
def test_the_first_8_bit_step_is_torchs(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States begin at zero, which has a code: nothing is lost before the second step."""
    use(monkeypatch, backend)
    ours, theirs = parameter(), parameter()
    before = theirs.detach().clone()
    grads = gradients(1)
    train(case.ours([ours], **case.hyper), ours, grads)
    train(case.oracle([theirs], **case.hyper), theirs, grads)
    tolerance = ULPS * ((theirs - before).abs() + before.abs() + theirs.abs())
    assert ((ours - theirs).abs() <= tolerance).all()


SIGNED_HALF_GAP, UNSIGNED_HALF_GAP = 0.45 / 64, 0.45 / 128  # of the dynamic maps
TRACKED = {  # what a state keeps of the step before
    "Adam8bit defaults": {"exp_avg": 0.9, "exp_avg_sq": 0.999},
    "SGD8bit momentum": {"momentum_buffer": 0.9},
    "RMSprop8bit defaults": {"square_avg": 0.99},
    "Adagrad8bit defaults": {"sum": 1.0},
    "Lion8bit defaults": {"exp_avg": 0.99},
    "LAMB8bit defaults": {"exp_avg": 0.9, "exp_avg_sq": 0.999},
    "AdEMAMix8bit defaults": {"exp_avg": 0.9, "exp_avg_slow": 0.9999, "exp_avg_sq": 0.999},
}


def per_element(scale: Tensor) -> Tensor:
    """Those of blocks of 256, for each element of SHAPE."""
    return scale.repeat_interleave(256, 1)[:, : SHAPE[1]]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("name", TRACKED)
def test_8_bit_states_track_the_oracles(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step adds half a gap times the block's absmax at most, and keeps its part of the error before.

    (Without weight decay the states depend on the gradients alone, which both get.)
    """
    use(monkeypatch, backend)
    case = CASES[name]
    ours, theirs = parameter(), parameter()
    mine, oracle = case.ours([ours], **case.hyper), case.oracle([theirs], **case.hyper)
    signs = mine.rule(mine.param_groups[0]).states
    bound = {state: torch.zeros(SHAPE) for state in TRACKED[name]}
    for grad in gradients(20):
        train(mine, ours, [grad])
        train(oracle, theirs, [grad])
        for state, kept in TRACKED[name].items():
            codes, scale = mine.state[ours][f"{state}_codes"], mine.state[ours][f"{state}_scale"]
            half_gap = SIGNED_HALF_GAP if signs[state] else UNSIGNED_HALF_GAP
            rounding = 4 * 2**-24
            bound[state] = kept * bound[state] + (half_gap + rounding) * per_element(scale.abs())
            decoded = opt8bit.quant.decode_state(codes, scale, signs[state], 256)
            error = (decoded - oracle.state[theirs][state]).abs()
            assert (error <= bound[state]).all(), state
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
        absmax = per_element(mine.state[ours]["momentum_buffer_scale"].abs())
        state_bound = momentum * state_bound + (SIGNED_HALF_GAP + 4 * 2**-24) * absmax
        assert ((ours - theirs).abs() <= bound).all()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(stateful: Case, kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From equal states a step's codes differ by one level at most, on few elements; parameters by rounding."""
    results, ran = [], []
    for name in (kernels, "reference"):
        use(monkeypatch, "reference")
        param = parameter(dtype=dtype)
        optimizer = stateful.ours([param], **stateful.hyper)
        train(optimizer, param, gradients(3))
        use(monkeypatch, name)
        step = type(get(name)).step
        monkeypatch.setattr(
            get(name), "step", lambda groups, name=name, step=step: ran.append(name) or step(get(name), groups)
        )
        train(optimizer, param, gradients(1, seed=9))
        results.append((param.detach().float(), optimizer.state[param]))
    assert ran == [kernels, "reference"]
    (ours, mine), (theirs, reference) = results
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    # A gradient and its decay may cancel before a division, which then makes more of their rounding, on few elements.
    is_near = (ours - theirs).abs() <= ulp * theirs.abs() + ULPS
    assert is_near.float().mean() >= 1 - 1e-3
    torch.testing.assert_close(ours, theirs, rtol=2 * ulp, atol=1e-4)
    assert_states_agree(mine, reference, share=1e-3, rtol=100 * ULPS)


def test_instruction_sets_and_threads_give_the_same_bits(
    any_shape: Case, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for name, count in (("scalar", 1), (kernels, 1), (kernels, 2), (kernels, 5)):
            use(monkeypatch, name)
            torch.set_num_threads(count)
            params = [parameter(0), parameter(1, (700, 64)), parameter(2, (3,)), parameter(3, (64, 1000))]
            optimizer = any_shape.ours(params, **any_shape.hyper)
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
    names = {name.removesuffix("_codes") for name in state if name.endswith("_codes")}
    assert set(state) == {"step", *(f"{name}_{part}" for name in names for part in ("codes", "scale"))}
    renamed = {"variance": "square_avg"}  # centered RMSprop's
    reference = parameter()
    theirs = stateful.oracle([reference], **stateful.hyper)
    train(theirs, reference, gradients(1))
    assert {renamed.get(name, name) for name in names} == set(theirs.state[reference]) - {"step"}
    for name in names:
        codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
        assert codes.dtype == torch.uint8 and codes.shape == SHAPE
        assert scale.dtype == torch.float32 and scale.shape == (32, 2)


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
    stored = optimizer.state[param]["exp_avg_codes" if bits == 8 else "exp_avg"]
    assert stored.dtype == (torch.uint8 if bits == 8 else torch.float32)
    assert stored.shape == shape


def test_a_parameters_own_state_bits_win() -> None:
    param: Any = parameter()
    param.state_bits = 32
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def assigned(model: nn.Module) -> nn.Module:
    other = nn.Linear(64, 128, device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("renewed", [copy.deepcopy, assigned])
def test_new_parameters_lack_state_bits_until_they_are_marked_or_in_a_group(renewed: Any) -> None:
    def states(params: Any) -> dict[str, Tensor]:
        optimizer = opt8bit.AdamW8bit(params)
        train(optimizer, model.weight, [torch.ones(128, 64)])
        return optimizer.state[model.weight]

    model: Any = nn.Linear(64, 128)
    model.weight.state_bits = 32
    assert "exp_avg" in states([model.weight])
    model = renewed(model)
    assert "exp_avg_codes" in states([model.weight])
    assert "exp_avg" in states([{"params": [model.weight], "state_bits": 32}])
    model.weight.state_bits = 32
    assert "exp_avg" in states([model.weight])


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
    assert optimizer.state[params[2]]["exp_avg_scale"].shape == (32, 5)


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
def test_other_layouts_are_updated_in_place(any_shape: Case, layout: str) -> None:
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
    train(any_shape.ours([param], **any_shape.hyper), param, [grad] * 3)
    train(any_shape.ours([plain], **any_shape.hyper), plain, [grad.contiguous()] * 3)
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
    assert optimizer.step(closure) < first
    assert param.grad is not None and not param.grad.isnan().any()


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
        ({"capturable": True}, "capturable must be left out.* got True"),
        ({"differentiable": True}, "differentiable must be left out.* got True"),
    ],
)
def test_bad_hyper_parameters_are_refused(any_shape: Case, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        any_shape.ours([parameter()], **{**any_shape.hyper, **hyper})
    with pytest.raises(ValueError, match=message):
        any_shape.ours([parameter()], **any_shape.hyper).add_param_group({"params": [parameter(1)], **hyper})


@pytest.mark.parametrize("value", ["a", None, True, float("inf")])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((opt8bit.AdEMAMix8bit, "alpha"), (opt8bit.LARS8bit, "trust_coefficient"), (opt8bit.LAMB8bit, "eps")),
        *((opt8bit.Lion8bit, "weight_decay"), (opt8bit.AdamWScheduleFree8bit, "r")),
    ],
)
def test_what_is_no_finite_number_is_refused(make: Any, name: str, value: Any) -> None:
    """By the optimizers that torch.optim lacks: it accepts infinity and True, and so do its counterparts here."""
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got {value!r}"):
        make([parameter()], **{name: value})


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
            lambda: opt8bit.AdamW8bit([parameter()], amount=3),  # type: ignore[call-arg]
            TypeError,
            "unexpected keyword argument 'amount': it has lr, betas, .*, block_size, .*state_bits",
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
    assert not optimizer.state


def test_block_size_cannot_change_during_training() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    optimizer.param_groups[0]["block_size"] = 64
    with pytest.raises(ValueError, match=r"with block_size 64, state .*_scale"):
        train(optimizer, param, gradients(1))


def test_a_block_size_beyond_the_kernels_is_refused_wherever_it_comes_from() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["block_size"] = 2**20
    with pytest.raises(ValueError, match="from 16 to 16384, got 1048576"):
        train(optimizer, param, gradients(1))
    with pytest.raises(ValueError, match="from 16 to 16384, got 1048576"):
        optimizer.load_state_dict(saved)


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
    with pytest.raises(ValueError, match=r"parameter 0, of shape .* state 'exp_avg\w*' must be of shape"):
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
    param: Any = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    param.state_bits = 32
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, param, gradients(1))
    assert optimizer.state[param]["max_exp_avg_sq_codes"].dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 32])
def test_momentum_may_be_switched_on_later(bits: int) -> None:
    """torch.optim takes the first gradient undampened that the buffer sees, not the first there was."""
    params = [parameter(), parameter()]
    optimizers = [
        opt8bit.SGD8bit([params[0]], dampening=0.5, state_bits=bits),
        torch.optim.SGD([params[1]], dampening=0.5),
    ]
    for optimizer, param in zip(optimizers, params, strict=True):
        train(optimizer, param, gradients(2))
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, param, gradients(1, seed=5))
    torch.testing.assert_close(*params, rtol=1e-6, atol=1e-5)


def test_without_fused_the_reference_serves(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    def fail(groups: Any) -> None:
        raise AssertionError("the kernels ran")

    use(monkeypatch, kernels)
    monkeypatch.setattr(get(kernels), "step", fail)
    param = parameter()
    train(opt8bit.AdamW8bit([param], fused=False), param, gradients(1))
    with pytest.raises(AssertionError, match="the kernels ran"):
        train(opt8bit.AdamW8bit([param]), param, gradients(1))


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
    train(case.oracle([theirs], **case.hyper), theirs, gradients(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in STATEFUL if not name.startswith("LARS")])
def test_a_learning_rate_schedule_is_followed(name: str) -> None:
    """(The buffer of LARS holds steps already taken at their own learning rate.)"""
    stateful, param = STATEFUL[name], parameter()
    optimizer = stateful.ours([param], **stateful.hyper)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    train(optimizer, param, gradients(1))
    schedule.step()
    before = param.detach().clone()
    train(optimizer, param, gradients(1))
    assert torch.equal(param, before)


def test_tensors_may_be_swapped() -> None:
    """torch.utils.swap_tensors, and so Module.to() if asked, changes what a tensor is, not which."""
    param, other = parameter(), parameter()
    optimizer = opt8bit.AdamW8bit([param], lr=1.0)
    train(optimizer, param, gradients(1))
    kept = other.detach().clone()
    param.grad = None
    torch.utils.swap_tensors(param, other)
    train(optimizer, param, gradients(1))
    assert not torch.equal(param, kept)


def test_a_plan_keeps_no_gradients_and_no_old_states() -> None:
    param = parameter()
    optimizer = opt8bit.AdamW8bit([{"params": [param]}, {"params": [parameter(1)]}])
    optimizer.param_groups[1]["params"][0].grad = torch.ones(SHAPE)
    train(optimizer, param, gradients(1))
    gone = [weakref.ref(param.grad), weakref.ref(optimizer.state[param]["exp_avg_codes"])]
    gone.append(weakref.ref(optimizer.param_groups[1]["params"][0]))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, param, gradients(1))
    optimizer.state.pop(optimizer.param_groups.pop()["params"][0])
    train(optimizer, param, gradients(1))
    gc.collect()
    assert [each() for each in gone] == [None] * 3


@pytest.mark.parametrize("place", ["hyper", "option", "flag"])
def test_what_is_written_into_a_group_is_checked_at_the_next_step(place: str) -> None:
    name, value = {"hyper": ("betas", (1.5, 2.0)), "option": ("differentiable", True), "flag": ("amsgrad", "no")}[place]
    param = parameter()
    optimizer = opt8bit.AdamW8bit([param])
    train(optimizer, param, gradients(1))
    optimizer.param_groups[0][name] = value
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"Invalid beta|differentiable must be|amsgrad must be"):
        train(optimizer, param, gradients(1))
    assert torch.equal(param, before) and optimizer.state[param]["step"].item() == 1


def test_a_failed_step_makes_no_states() -> None:
    exact = nn.Parameter(parameter().detach().double())
    optimizer = opt8bit.AdamW8bit([parameter(), exact], fused=True)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="fused=True"):
        optimizer.step()
    assert not optimizer.state


def test_parameters_that_share_memory_are_stepped_one_after_another() -> None:
    storage = torch.zeros(64, 64)
    params = [nn.Parameter(storage), nn.Parameter(storage.t()), nn.Parameter(storage[3:])]
    optimizer = opt8bit.SGD8bit(params, lr=1.0)
    for param in params:
        param.grad = torch.ones(param.shape)
    optimizer.step()
    assert (storage[:3] == -2).all() and (storage[3:] == -3).all()


def test_a_parameter_that_overlaps_itself_is_refused() -> None:
    param = nn.Parameter(torch.randn(1, 64).expand(64, 64))
    param.grad = torch.ones(64, 64)
    with pytest.raises(RuntimeError, match="are one number in memory"):
        opt8bit.AdamW8bit([param]).step()


def test_a_gradient_of_a_wider_dtype_is_not_rounded() -> None:
    param = parameter(dtype=torch.float16)
    param.grad_dtype = torch.float32
    param.grad = torch.full(SHAPE, 1e6)
    before = param.detach().clone()
    opt8bit.AdamW8bit([param], lr=0.01, weight_decay=0.0).step()
    torch.testing.assert_close(param, before - 0.01, rtol=2**-10, atol=2**-11)


def test_bad_attributes_and_types_are_refused() -> None:
    param: Any = parameter()
    param.state_bits = 16
    param.grad = torch.ones(SHAPE)
    with pytest.raises(ValueError, match="state_bits must be 8 or 32, got 16 as an attribute"):
        opt8bit.AdamW8bit([param]).step()
    with pytest.raises(TypeError, match="ordered collections"):
        opt8bit.AdamW8bit([{"params": {parameter()}}])
    with pytest.raises(ValueError, match="adapt must be True or False, got 'no'"):
        opt8bit.LAMB8bit([parameter()], adapt="no")  # type: ignore[arg-type]


def test_momentum_may_be_a_tensor() -> None:
    params = [parameter(), parameter()]
    for param, momentum in zip(params, (0.9, torch.tensor(0.9, dtype=torch.float64)), strict=True):
        train(opt8bit.SGD8bit([param], momentum=momentum), param, gradients(2))  # type: ignore[arg-type]
    assert torch.equal(*params)
