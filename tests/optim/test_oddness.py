"""No direction is favoured: training on -g from -p gives exactly the negative of training on g from p.

Every rule is odd, rounding to nearest is, and so is the coding of states: their scales carry the sign.
"""

import functools
from typing import Any

import pytest
import torch
from cases import ANY_SHAPE, CASES, MUON, STATEFUL, UNSIGNED, Case, gradients, parameter, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opt8bit.backends import available
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.muon import muon

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((5, 300), (20, 16), (7,))  # with short blocks, of one block a row, and too small for codes
STEPS = 3
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float16": (torch.float16, {}),
    "bfloat16, nearest": (torch.bfloat16, {}),
    "bfloat16, stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 3}),
    "bfloat16, compensated": (torch.bfloat16, {"compensation": True}),
}


@functools.cache
def grads_with_ties(number: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Gradients whose largest elements are a and -a, in many blocks; some are 0, and some -0."""
    grad = gradients(1, shape, seed)[0]
    flat = grad.reshape(-1)
    for start in range(0, len(flat) - 5, 50):
        first, second = (start, start + 3) if (start // 50 + number) % 2 else (start + 3, start)
        flat[first], flat[second], flat[start + 1], flat[start + 2] = 4096.0, -4096.0, 0.0, -0.0
    return grad


def trained(case: Case, sign: int, dtype: torch.dtype, **options: Any) -> tuple[Optimizer8bit, list[nn.Parameter]]:
    shapes = [shape for shape in SHAPES if len(shape) == 2 or case not in MUON.values()]
    params = [nn.Parameter(sign * parameter(i, shape, dtype).detach()) for i, shape in enumerate(shapes)]
    optimizer = case.ours(params, **{"min_8bit_size": 0, "block_size": 64, **case.hyper, **options})
    for number in range(STEPS):
        for i, param in enumerate(params):
            param.grad = sign * grads_with_ties(number, tuple(param.shape), 10 * number + i).to(dtype)
        optimizer.step()
    return optimizer, params


def negative(name: str, value: Tensor) -> Tensor:
    """What a stored state is where everything has the other sign. (Its codes count in units of the scale.)"""
    state = name.removesuffix("_codes").removesuffix("_scale")
    is_same = name in ("step", "compensation") or name.endswith("_codes") or state in UNSIGNED
    return value if is_same else -value


def assert_opposite(one: tuple[Optimizer8bit, list[nn.Parameter]], other: tuple[Optimizer8bit, list]) -> None:
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert torch.equal(theirs, -mine)
        states = one[0].state[mine], other[0].state[theirs]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert torch.equal(states[1][name], negative(name, value)), name


def skip_unless_products_repeat(case: Case) -> None:
    """Muon's matrix products are torch's, and need not have the same bits twice."""
    if case not in MUON.values():
        return
    hyper = {"momentum": 0.95, "lr": 1e-3, "weight_decay": 0.1, "nesterov": True}
    for shape in SHAPES[:2]:
        param, grad = parameter(0, shape).detach(), gradients(1, shape)[0]
        optimizer = case.ours([nn.Parameter(param)], **case.hyper)
        full = {**optimizer.hyper(optimizer.param_groups[0]), **hyper}
        results = [muon(param, grad, torch.zeros(shape), step=1, **full)[0] for _ in range(3)]
        if not all(torch.equal(result, results[0]) for result in results):
            pytest.skip("products of matrices do not repeat here")


@pytest.mark.sampled(11)
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", [*CASES, *MUON])
def test_the_negative_trains_to_the_negative(
    name: str, bits: int, form: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, (dtype, options) = {**CASES, **MUON}[name], FORMS[form]
    skip_unless_products_repeat(case)
    use(monkeypatch, backend)
    one, other = (trained(case, sign, dtype, state_bits=bits, **options) for sign in (1, -1))
    coded = [key for param in one[1] for key in one[0].state[param] if key.endswith("_codes")]
    assert bool(coded) == (bits == 8 and bool(one[0].rule(one[0].param_groups[0]).states))
    assert_opposite(one, other)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.slow_interpreted
def test_whatever_the_decay_and_the_direction(
    name: str, maximize: bool, weight_decay: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And maximizing on -g is minimizing on g."""
    case = STATEFUL[name]
    skip_unless_products_repeat(case)
    use(monkeypatch, backend)
    hyper = {"weight_decay": weight_decay, "maximize": maximize}
    one, other = (trained(case, sign, torch.float32, **hyper) for sign in (1, -1))
    assert_opposite(one, other)
    signs = one[0].rule(one[0].param_groups[0]).states
    scales = [one[0].state[param].get(f"{state}_scale", torch.ones(1)) for param in one[1] for state in signs]
    assert any((scale < 0).any() for scale in scales) == any(signs.values())


# Left out: centered RMSprop, which divides by the deviation of gradients that have none; LARS where a step is lost in
# the parameter's rounding, or the parameter overflows; and Muon, whose updates are not their own gradients' alone.
MAGNITUDES = [
    name for name in CASES if "centered" not in name and name not in ("LARS8bit defaults", "LARS8bit weight decay")
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MAGNITUDES)
def test_gradients_of_one_magnitude_move_parameters_as_far_as_with_32_bits(name: str) -> None:
    """Within 1%, all up, all down, and both in one block, where those of the other sign than the scale end at 0.993."""
    case, grad = CASES[name], torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).sign()
    grad[0], grad[1] = 1, -1  # blocks of one sign
    moved = []
    for bits in (8, 32):
        param = nn.Parameter(torch.full(grad.shape, 2.0**-6))
        optimizer = case.ours([param], **{**case.hyper, "min_8bit_size": 0, "state_bits": bits})
        for group in optimizer.param_groups:
            group.update({"weight_decay": 0.0} if "weight_decay" in group else {})
        for _ in range(1000):
            param.grad = grad
            optimizer.step()
        moved.append(param.detach() - 2.0**-6)
    assert moved[1].abs().min() > 0
    torch.testing.assert_close(moved[0] / moved[1], torch.ones(grad.shape), rtol=0, atol=0.01)


numbers = st.one_of(
    st.floats(width=32, min_value=-1e4, max_value=1e4),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-126), 1e-8, torch.nan, torch.inf, -torch.inf]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(ANY_SHAPE)),
    few=st.lists(numbers, min_size=1, max_size=6),
    length=st.integers(16, 70),
    bits=st.sampled_from([8, 32]),
    is_compensated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_gradients_of_few_different_numbers(
    name: str, few: list[float], length: int, bits: int, is_compensated: bool, seed: int
) -> None:
    """Many of a block are its largest, and some are not finite. A parameter that is NaN has no sign."""
    case, dtype = ANY_SHAPE[name], torch.bfloat16 if is_compensated else torch.float32
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, length, generator=generator)
    grads = torch.tensor(few)[torch.randint(len(few), (2, 3, length), generator=generator)]
    grads = torch.where(torch.rand(grads.shape, generator=generator) < 0.5, grads, -grads)
    for backend in [each for each in available("cpu") if each != "triton"]:  # which takes long to interpret
        results = []
        for sign in (1, -1):
            param = nn.Parameter((sign * values).to(dtype))
            options = {"min_8bit_size": 0, "block_size": 16, "state_bits": bits, "compensation": is_compensated}
            optimizer = case.ours([param], **{**case.hyper, **options})
            with pytest.MonkeyPatch.context() as patch:
                use(patch, backend)
                for grad in grads:
                    param.grad = (sign * grad).to(dtype)
                    optimizer.step()
            results.append((param.detach(), optimizer.state[param]))
        (one, mine), (other, theirs) = results
        torch.testing.assert_close(other, -one, rtol=0, atol=0, equal_nan=True)
        is_nan = one.isnan()
        for key, value in mine.items():
            expected = negative(key, value)
            if key == "compensation":  # of a NaN, any bits
                assert torch.equal(theirs[key][~is_nan], expected[~is_nan])
            else:
                torch.testing.assert_close(theirs[key], expected, rtol=0, atol=0, equal_nan=True)
