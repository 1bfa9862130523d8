"""What torch.optim promises of an optimizer, on torch's own table of inputs where torch has the optimizer, with
parameters that are large enough for 8-bit states."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import STATEFUL, VARIANTS
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import opt8bit
from opt8bit.optim.base import Optimizer8bit

Maker = Callable[..., Optimizer8bit]
TABLE: Any = optim_db
TORCHS = {info.optim_cls.__name__: info for info in TABLE}
CLASSES: dict[str, Maker] = {
    **{ours.__name__: ours for ours, _, _ in VARIANTS},
    "Muon8bit": opt8bit.Muon8bit,
}
HERE_TOO = {name: TORCHS[name.removesuffix("8bit")] for name in CLASSES if name.removesuffix("8bit") in TORCHS}
INPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name} {given.desc}": (name, given.kwargs)
        for name, info in HERE_TOO.items()
        for given in info.optim_inputs_func(device="cpu")
    },
    **{
        f"{ours.__name__} {desc}": (ours.__name__, hyper)
        for ours, _, variants in VARIANTS
        if ours.__name__ not in HERE_TOO
        for desc, hyper in variants.items()
    },
}
ERRORS = {
    f"{name} {error.optimizer_error_input.desc}": (name, error)
    for name, info in HERE_TOO.items()
    for error in info.optim_error_inputs_func("cpu", torch.float32)
    if "foreach"
    not in error.optimizer_error_input.kwargs  # of torch's own loops, which take no tensors: here nothing depends on it
}


@pytest.fixture(params=INPUTS)
def make(request: pytest.FixtureRequest) -> Maker:
    """Makes the optimizer of a row of the table, over the parameters given."""
    name, kwargs = INPUTS[request.param]
    return lambda params, **more: CLASSES[name](params, **{**copy.deepcopy(kwargs), **more})


@pytest.fixture(params=STATEFUL)
def stateful(request: pytest.FixtureRequest) -> Maker:
    case = STATEFUL[request.param]
    return lambda params, **more: case.ours(params, **{**copy.deepcopy(case.hyper), **more})


def problem(seed: int = 0) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Two matrices to fit to a product; each has 8-bit states."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator) / 8) for shape in ((64, 96), (96, 64))]
    x, y = torch.randn(50, 64, generator=generator), torch.randn(50, 64, generator=generator)
    return params, lambda: (x @ params[0] @ params[1] - y).square().mean()


def closure_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], sign: float = 1) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        (sign * value).backward()
        return value

    return closure


def run(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, loss))


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_optimizer_of_torch_that_is_here_is_in_the_table() -> None:
    assert set(HERE_TOO) >= {f"{name}8bit" for name in ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Muon")}


@pytest.mark.parametrize("key", ERRORS)
def test_errors_are_torchs(key: str) -> None:
    name, error = ERRORS[key]
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(64, 64))]
    kind = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with kind(error.error_type, match=error.error_regex):
        optimizer = CLASSES[name](params, **given.kwargs)
        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()


def test_the_loss_falls(make: Maker) -> None:
    params, loss = problem()
    optimizer = make(params)
    sign = -1 if optimizer.defaults["maximize"] else 1
    first = loss().item()
    for _ in range(5):
        optimizer.step(closure_of(optimizer, loss, sign))
    assert loss().item() < first
    for param in params:
        coded = [value for value in optimizer.state[param].values() if value.dtype == torch.uint8]
        assert coded or set(optimizer.state[param]) == {"step"}


def test_maximize_ascends_the_negated_loss(stateful: Maker) -> None:
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        params, loss = problem()
        optimizer = stateful(params, maximize=maximize)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss, sign))
        results.append(params)
    assert_same(*results)


def test_no_gradient_no_step(make: Maker) -> None:
    params, _ = problem()
    before = copy.deepcopy(params)
    optimizer = make(params)
    assert optimizer.step() is None
    assert_same(params, before)
    assert not any(optimizer.state.values())


def test_zero_gradients_without_decay_do_not_move(stateful: Maker) -> None:
    params, _ = problem()
    before = copy.deepcopy(params)
    optimizer = stateful(params, weight_decay=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(3):
        optimizer.step()
    assert_same(params, before)


def test_gradients_are_not_written(make: Maker) -> None:
    params, loss = problem()
    optimizer = make(params)
    loss().backward()
    grads = [param.grad.clone() for param in params]  # type: ignore[union-attr]
    optimizer.step()
    assert_same([param.grad for param in params], grads)


def test_a_tensor_lr_is_kept_and_followed(stateful: Maker) -> None:
    lr = torch.tensor(0.25)
    results = []
    for given in (lr, 0.25):
        params, loss = problem()
        optimizer = stateful(params, lr=given)
        run(optimizer, loss, 1)
        assert optimizer.param_groups[0]["lr"] is given
        if given is lr:
            lr.mul_(0.5)
        else:
            optimizer.param_groups[0]["lr"] = 0.125
        run(optimizer, loss, 1)
        results.append(params)
    assert_same(*results)


def test_groups_take_their_own_hyper_parameters(stateful: Maker) -> None:
    params, loss = problem()
    optimizer = stateful([{"params": params[:1], "lr": 0.0, "weight_decay": 0.0}, {"params": params[1:]}])
    before = copy.deepcopy(params)
    run(optimizer, loss, 1)
    assert_same(params[0], before[0])
    assert not torch.equal(params[1], before[1])


def test_a_group_may_be_added_later(stateful: Maker) -> None:
    params, loss = problem()
    optimizer = stateful(params[:1])
    run(optimizer, loss, 1)
    optimizer.add_param_group({"params": params[1:], "block_size": 64})
    before = copy.deepcopy(params)
    run(optimizer, loss, 1)
    assert not torch.equal(params[1], before[1])
    assert optimizer.param_groups[1]["block_size"] == 64 and optimizer.param_groups[1]["min_8bit_size"] == 4096


def test_named_parameters(stateful: Maker) -> None:
    params, loss = problem()
    named = stateful(zip(("first", "second"), params, strict=True))
    run(named, loss, 2)
    assert named.param_groups[0]["param_names"] == ["first", "second"]
    others, other_loss = problem()
    run(stateful(others), other_loss, 2)
    assert_same(params, others)
    loaded = stateful(zip(("first", "second"), others, strict=True))
    loaded.load_state_dict(named.state_dict())
    assert loaded.state_dict()["param_groups"] == named.state_dict()["param_groups"]


def test_repr_names_every_option(make: Maker) -> None:
    optimizer = make(problem()[0])
    text = repr(optimizer)
    assert text.startswith(type(optimizer).__name__)
    assert all(f"{name}: " in text for name in optimizer.defaults)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict", "weights_only"])
def test_training_goes_on_as_if_nothing_happened(make: Maker, way: str) -> None:
    params, loss = problem()
    optimizer = make(params)
    run(optimizer, loss, 2)
    if way in ("deepcopy", "pickle"):
        both = (optimizer, params)
        other, others = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    else:
        others, _ = problem()
        with torch.no_grad():
            for theirs, ours in zip(others, params, strict=True):
                theirs.copy_(ours)
        other, saved = make(others), optimizer.state_dict()
        if way == "weights_only":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
    for param, theirs in zip(params, others, strict=True):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(3))
        theirs.grad = param.grad.clone()
    for _ in range(2):
        optimizer.step()
        other.step()
    assert_same(params, others)
    assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_an_empty_state_dict_goes_round(make: Maker) -> None:
    params, loss = problem()
    optimizer = make(params)
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, loss, 1)


def test_hooks_run_in_their_order() -> None:
    params, loss = problem()
    optimizer = opt8bit.AdamW8bit(params)
    calls: list[str] = []
    note = lambda name: lambda *_: calls.append(name)  # noqa: E731
    handles = [
        optimizer.register_step_pre_hook(note("step pre")),
        optimizer.register_step_post_hook(note("step post")),
        optimizer.register_state_dict_pre_hook(note("state_dict pre")),
        optimizer.register_state_dict_post_hook(note("state_dict post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]
    run(optimizer, loss, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    expected = ["step pre", "step post", "state_dict pre", "state_dict post", "load pre", "load post"]
    assert calls == expected
    for handle in handles:
        handle.remove()
    run(optimizer, loss, 1)
    assert calls == expected


def test_hooks_of_all_optimizers_run() -> None:
    params, loss = problem()
    optimizer = opt8bit.AdamW8bit(params)
    calls: list[str] = []
    run(optimizer, loss, 1)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    run(optimizer, loss, 1)
    assert calls == ["pre", "post"]
    handles[0].remove()
    run(optimizer, loss, 1)
    assert calls == ["pre", "post", "post"]
    handles[1].remove()
    run(optimizer, loss, 1)
    assert calls == ["pre", "post", "post"]


def test_profilers_see_steps() -> None:
    params, loss = problem()
    optimizer = opt8bit.AdamW8bit(params)
    run(optimizer, loss, 1)
    with torch.profiler.profile() as profile:
        run(optimizer, loss, 2)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#AdamW8bit.step"] == 2


def test_a_hook_may_change_what_is_saved_and_loaded() -> None:
    params, loss = problem()
    optimizer = opt8bit.AdamW8bit(params)
    run(optimizer, loss, 1)

    def forget_first(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {1: state_dict["state"][1]}}

    optimizer.register_load_state_dict_pre_hook(forget_first)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert not optimizer.state[params[0]] and set(saved["state"]) == {0, 1}
    assert_same(optimizer.state_dict()["state"][1], saved["state"][1])
    run(optimizer, loss, 1)


def test_zero_element_and_scalar_parameters(make: Maker) -> None:
    is_muon = isinstance(make(problem()[0]), opt8bit.Muon8bit)
    shapes = [(0, 5), (5, 0), (1, 1)] if is_muon else [(0,), (0, 5), (5, 0), ()]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make(params)
    for param in params:
        param.grad = torch.ones(param.shape)
    optimizer.step()
    assert params[-1].item() != 1


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 1),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 2]),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, total_iters=1),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [1]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9)]),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 2, cycle_momentum=False),
    "CyclicLR of betas": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_do_what_they_do_to_torchs(name: str, tensor_lr: bool) -> None:
    """With 32-bit states, AdamW goes torch's way under every schedule, to rounding."""
    results = []
    for ours in (True, False):
        params, loss = problem()
        lr: Any = torch.tensor(0.05) if tensor_lr else 0.05
        optimizer = opt8bit.AdamW8bit(params, lr=lr, state_bits=32) if ours else torch.optim.AdamW(params, lr=lr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers about their own arguments
            scheduler = SCHEDULERS[name](optimizer)
            for _ in range(4):
                run(optimizer, loss, 1)
                scheduler.step(*([loss().item()] if name == "ReduceLROnPlateau" else []))
        results.append((params, [float(group["lr"]) for group in optimizer.param_groups], optimizer))
    (mine, lr, _), (theirs, lr_theirs, _) = results
    assert lr == pytest.approx(lr_theirs, rel=1e-6)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_is_taken_and_changes_nothing(make: Maker, foreach: bool) -> None:
    results = []
    for options in ({}, {"foreach": foreach}):
        params, loss = problem()
        optimizer = make(params, **options)
        run(optimizer, loss, 2)
        results.append([*params, *(dict(optimizer.state[param]) for param in params)])
    assert_same(*results)
    assert optimizer.param_groups[0]["foreach"] is foreach


def test_foreach_is_a_flag(make: Maker) -> None:
    with pytest.raises(ValueError, match="foreach must be True, False or None, got 'yes'"):
        make(problem()[0], foreach="yes")


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_that_cannot_be_honoured_are_refused(make: Maker, flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag} must be left out"):
        make(problem()[0], **{flag: True})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64])
@pytest.mark.parametrize("key", [key for key, (name, _) in INPUTS.items() if name in HERE_TOO and name != "Muon8bit"])
def test_wide_dtypes_equal_torch(key: str, dtype: torch.dtype) -> None:
    """Complex parameters are pairs of numbers, whose states are kept in full."""
    name, kwargs = INPUTS[key]
    ours = nn.Parameter(torch.randn(64, 96, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    theirs = nn.Parameter(ours.detach().clone())
    mine = CLASSES[name]([ours], **copy.deepcopy(kwargs))
    kept = {key: value for key, value in mine.defaults.items() if key not in opt8bit.optim.options.DEFAULTS}
    torchs = HERE_TOO[name].optim_cls([theirs], **kept, maximize=mine.defaults["maximize"])
    for seed in range(3):
        ours.grad = torch.randn(64, 96, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    rtol = 1e-4 if dtype == torch.complex64 else 1e-9
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for state in mine.state[ours]:
        if state in torchs.state[theirs] and state != "step":
            assert mine.state[ours][state].dtype == dtype
