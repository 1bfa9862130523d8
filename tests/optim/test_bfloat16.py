"""Training bfloat16 parameters without losing small updates."""

import math
from typing import Any

import pytest
import torch
from cases import ANY_SHAPE, Case, gradients, parameter, train, use
from torch import nn

import opt8bit
from opt8bit.optim.options import Options

WAYS: dict[str, Options] = {"stochastic": {"stochastic_rounding": True}, "compensated": {"compensation": True}}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ANY_SHAPE)
def test_instruction_sets_and_threads_give_the_same_bits(
    name: str, way: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, threads, results = ANY_SHAPE[name], torch.get_num_threads(), []
    try:
        for backend, count in (("scalar", 1), (kernels, 2), (kernels, 5)):
            use(monkeypatch, backend)
            torch.set_num_threads(count)
            shapes = ((32, 300), (700, 64), (3,), (64, 1000))
            params = [parameter(i, shape, torch.bfloat16) for i, shape in enumerate(shapes)]
            optimizer = case.ours(params, **case.hyper, **WAYS[way])
            for seed in range(3):
                for param in params:
                    param.grad = gradients(1, tuple(param.shape), seed)[0].bfloat16()
                optimizer.step()
            results.append([*params, *(value for param in params for value in optimizer.state[param].values())])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_kernels_round_as_the_reference(way: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD, exact in both: what is left is the rounding."""
    results = []
    for backend in (kernels, "reference"):
        use(monkeypatch, backend)
        params = [parameter(i, (32, 300), torch.bfloat16) for i in range(2)]
        optimizer = opt8bit.SGD8bit(params, lr=2.0**-9, **WAYS[way])
        for _ in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.75)
            optimizer.step()
        results.append([*params, *(value for param in params for value in optimizer.state[param].values())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_small_updates_are_lost_without() -> None:
    """An update of 1/1024 is an eighth of the distance between bfloat16 numbers at 1, and rounds to nothing."""
    steps, n = 64, 64 * 300
    ways: list[tuple[Options, float]] = [({}, 0.0), *((way, steps / 1024) for way in WAYS.values())]
    for options, expected in ways:
        param = nn.Parameter(torch.ones(64, 300, dtype=torch.bfloat16))
        optimizer = opt8bit.SGD8bit([param], lr=1 / 1024, **options)
        train(optimizer, param, [-torch.ones(64, 300)] * steps)
        moved = param.double() - 1
        # Each rounding has a variance of ulp^2 / 4 at most; compensation makes none.
        deviation = 2**-7 * 0.5 * math.sqrt(steps / n)
        assert abs(moved.mean() - expected) <= (5 * deviation if options == WAYS["stochastic"] else 0)


def test_the_seed_decides() -> None:
    def trained(seed: int) -> torch.Tensor:
        param = parameter(dtype=torch.bfloat16)
        train(opt8bit.AdamW8bit([param], stochastic_rounding=True, seed=seed), param, gradients(3))
        return param.detach()

    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))


def test_parameters_and_steps_have_their_own_random_bits() -> None:
    params = [nn.Parameter(torch.ones(32, 300, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = opt8bit.SGD8bit(params, lr=2.0**-9, stochastic_rounding=True)
    history = []
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
            param.data.fill_(1)
        optimizer.step()
        history += [param.detach().clone() for param in params]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(history[i], history[j])


def test_compensated_training_is_float32_training(
    stateful: Case, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the parameter and its compensation are the float32 number."""
    use(monkeypatch, kernels)
    low, full = parameter(dtype=torch.bfloat16), nn.Parameter(parameter(dtype=torch.bfloat16).detach().float())
    compensated = stateful.ours([low], compensation=True, **stateful.hyper)
    plain = stateful.ours([full], **stateful.hyper)
    for grad in gradients(5):
        train(compensated, low, [grad.bfloat16()])
        train(plain, full, [grad.bfloat16().float()])
    bits = (low.detach().view(torch.int16).int() << 16) + compensated.state[low]["compensation"].view(torch.int16)[
        ..., 0
    ]
    assert torch.equal(bits.view(torch.float32), full.detach())


@pytest.mark.parametrize("name", ["stochastic_rounding", "compensation"])
def test_float16_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: True}
    with pytest.raises(ValueError, match=rf"{name}=True is for bfloat16 parameters, got one of torch\.float16"):
        opt8bit.AdamW8bit([parameter(dtype=torch.float16)], **options)


def test_both_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="compensation=True leaves nothing to round by chance"):
        opt8bit.AdamW8bit([parameter()], stochastic_rounding=True, compensation=True)


def test_float32_is_not_affected(stateful: Case) -> None:
    params = [parameter() for _ in range(3)]
    for param, options in zip(params, ({}, *WAYS.values()), strict=True):
        train(stateful.ours([param], **stateful.hyper, **options), param, gradients(3))
    assert torch.equal(params[0], params[1]) and torch.equal(params[0], params[2])


def test_what_is_left_over_is_forgotten_where_it_is_not_wanted() -> None:
    param = parameter(dtype=torch.bfloat16)
    optimizer = opt8bit.AdamW8bit([param], compensation=True)
    train(optimizer, param, gradients(2))
    optimizer.param_groups[0]["compensation"] = False
    train(optimizer, param, gradients(1))
    assert "compensation" not in optimizer.state[param]


def test_each_parameter_has_its_own_chances(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever others have a gradient, too: a plan that was made for some is not one for others of their shapes."""
    use(monkeypatch, backend)
    results = []
    for keeps_plans in (True, False):
        params = [parameter(i, (16, 256), torch.bfloat16) for i in range(3)]
        optimizer = opt8bit.AdamW8bit(params, stochastic_rounding=True)
        for missing in (0, 1, 2):
            for i, param in enumerate(params):
                param.grad = None if i == missing else gradients(1, (16, 256), i)[0].bfloat16()
            if not keeps_plans:
                optimizer._running.plans.clear()
            optimizer.step()
        results.append(params)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
