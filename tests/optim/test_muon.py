import math

import pytest
import torch
from cases import gradients, parameter, train
from torch.optim import _muon

import opt8bit
from opt8bit.backends import processor, reference
from opt8bit.optim import muon as rules
from opt8bit.optim import newton_schulz
from opt8bit.optim.newton_schulz import LARGE, PANEL, orthogonalized, symmetric_product


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes in bfloat16, as torch's Muon does on every one, and has no AMX."""
    monkeypatch.setattr(processor, "has_bfloat16", lambda: True)
    monkeypatch.setattr(newton_schulz, "has_amx", lambda: False)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (32, 32)])
@pytest.mark.parametrize("steps", [0, 5])
def test_iterations_are_torchs(shape: tuple[int, int], steps: int) -> None:
    matrix = gradients(1, shape)[0]
    coefficients = (3.4445, -4.775, 2.0315)
    theirs = _muon._zeropower_via_newtonschulz(matrix, coefficients, steps, 1e-7)
    assert torch.equal(orthogonalized(matrix, coefficients, steps, 1e-7), theirs)


@pytest.mark.parametrize("shape", [(2 * PANEL + 90, 700), (700, 3 * PANEL)])
def test_iterations_by_panels_are_torchs(shape: tuple[int, int]) -> None:
    """But for the order in which a library adds: some elements are one bfloat16 away."""
    matrix = gradients(1, shape)[0]
    coefficients = (3.4445, -4.775, 2.0315)
    theirs = _muon._zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7)
    torch.testing.assert_close(orthogonalized(matrix, coefficients, 5, 1e-7), theirs, rtol=0.02, atol=1e-3)


def decaying(shape: tuple[int, int], smallest: float) -> torch.Tensor:
    """A matrix whose singular values fall from 1."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (left * torch.logspace(0, math.log10(smallest), len(right), dtype=torch.float64) @ right).float()


def iterated(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The iterations in float64."""
    x = matrix.double() / matrix.norm()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
@pytest.mark.parametrize("smallest", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("shape", [(128, 256), (300, 130)])
def test_iterations_on_one_gram_matrix_are_as_exact_as_torchs(
    shape: tuple[int, int], smallest: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far from those in float64 as torch's, and with singular values in the same range."""
    monkeypatch.setattr(newton_schulz, "LARGE", 64)
    monkeypatch.setattr(newton_schulz, "PANEL", 50)
    matrix, coefficients = decaying(shape, smallest), (3.4445, -4.775, 2.0315)
    exact = iterated(matrix, steps)
    theirs = _muon._zeropower_via_newtonschulz(matrix, coefficients, steps, 1e-7)
    ours = orthogonalized(matrix, coefficients, steps, 1e-7)
    batch = orthogonalized(torch.stack([matrix, -matrix]), coefficients, steps, 1e-7)
    error = (theirs - exact).norm()
    for each in (ours, batch[0], -batch[1]):
        assert (each - exact).norm() < max(1.1 * error, 0.03 * exact.norm())
        assert torch.linalg.matrix_norm(each.float(), 2) < 1.01 * torch.linalg.matrix_norm(theirs.float(), 2)
    assert steps == 1 or not torch.equal(ours, theirs)  # it is another way


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (3, 40, 100)])
def test_no_iterations_on_a_gram_matrix_leave_the_direction(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton_schulz, "LARGE", 16)
    matrices = gradients(1, shape)[0]
    found = orthogonalized(matrices, (3.4445, -4.775, 2.0315), 0, 1e-7)
    for each, matrix in zip(found.view(-1, *shape[-2:]), matrices.bfloat16().view(-1, *shape[-2:]), strict=True):
        assert torch.equal(each, matrix / matrix.norm())


@pytest.mark.parametrize("large", [16, 512])
@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (40, 40), (3, 40, 100)])
def test_processors_without_bfloat16_compute_in_float32(
    shape: tuple[int, ...], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_bfloat16", lambda: False)
    monkeypatch.setattr(newton_schulz, "LARGE", large)
    matrices = gradients(1, shape)[0]
    found = orthogonalized(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert found.dtype == torch.float32
    for each, expected in zip(found.view(-1, *shape[-2:]), matrices.view(-1, *shape[-2:]), strict=True):
        torch.testing.assert_close(each.double(), iterated(expected, 5), rtol=1e-3, atol=1e-4)


def test_products_are_halved_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiles it does only for very large ones."""
    made: list[int] = []
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size: made.append(len(x)) or original(x, *size))
    matrix = gradients(1, (LARGE, 8))[0].bfloat16()
    halved = symmetric_product(matrix, matrix.mT)
    assert made == [LARGE]
    monkeypatch.setattr(newton_schulz, "has_amx", lambda: True)
    torch.testing.assert_close(symmetric_product(matrix, matrix.mT), halved, rtol=0.01, atol=1e-3)
    assert made == [LARGE]
    monkeypatch.setattr(newton_schulz, "LARGE_WITH_AMX", LARGE)
    symmetric_product(matrix, matrix.mT)
    assert made == [LARGE, LARGE]


@pytest.mark.parametrize("n", [0, 1, PANEL, 2 * PANEL, 2 * PANEL + 1])
def test_symmetric_products_are_products(n: int) -> None:
    rows = gradients(1, (n, 8))[0].double()
    added = rows[:, :1] @ rows[:, :1].T
    torch.testing.assert_close(symmetric_product(rows, rows.T), rows @ rows.T)
    expected = 0.5 * rows @ rows.T - 2 * added
    torch.testing.assert_close(symmetric_product(rows, rows.T, added, beta=-2.0, alpha=0.5), expected)


def test_iterations_lead_to_singular_values_near_one() -> None:
    result = orthogonalized(torch.randn(40, 30), (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.3 and values.max() < 1.5


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "lr": 0.01},
        pytest.param(
            {"adjust_lr_fn": "spectral_unclamped", "lr": 0.01},
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 14),  # type: ignore[operator]
                reason="torch.optim.Muon has it from torch 2.14 on",
            ),
        ),
        {"momentum": 0.8, "ns_steps": 6},
    ],
)
@pytest.mark.parametrize("shape", [(64, 100), (100, 64)])
def test_32_bit_momentum_equals_torch(shape: tuple[int, int], hyper: dict) -> None:
    """Bit for bit: the operations are the same."""
    ours, theirs = parameter(shape=shape), parameter(shape=shape)
    mine = opt8bit.Muon8bit([ours], state_bits=32, **hyper)
    torchs = torch.optim.Muon([theirs], **hyper)
    for grad in gradients(5, shape):
        train(mine, ours, [grad])
        train(torchs, theirs, [grad])
        assert torch.equal(ours, theirs)
        assert torch.equal(mine.state[ours]["momentum_buffer"], torchs.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(64, 100), (100, 64), (64, 64)])
def test_spectral_unclamped_scales_lr_by_the_root_of_rows_over_columns(shape: tuple[int, int]) -> None:
    """Compares with torch's "original" at a rate that undoes its clamp, which every version of torch has."""
    rows, columns = shape
    ours, theirs = parameter(shape=shape), parameter(shape=shape)
    mine = opt8bit.Muon8bit([ours], lr=0.01, weight_decay=0.0, adjust_lr_fn="spectral_unclamped", state_bits=32)
    unclamped = 0.01 * math.sqrt(min(1, rows / columns))
    torchs = torch.optim.Muon([theirs], lr=unclamped, weight_decay=0.0, adjust_lr_fn="original")
    for grad in gradients(5, shape):
        train(mine, ours, [grad])
        train(torchs, theirs, [grad])
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("shape", [(64, 100), (100, 64)])
def test_equal_matrices_are_stepped_together_each_for_itself(
    shape: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the rounding of bfloat16, whose products a library may add in another order; the momentum is exact."""
    monkeypatch.setattr(reference, "TOGETHER", 2 * shape[0] * shape[1])
    sizes: list[int] = []
    original = rules.orthogonalized
    monkeypatch.setattr(rules, "orthogonalized", lambda x, *rest: sizes.append(x.dim()) or original(x, *rest))
    params = [parameter(seed, shape) for seed in (0, 1, 2)]
    alone = [param.detach().clone().requires_grad_() for param in params]
    params.insert(1, parameter(9, (48, 64)))
    alone.insert(1, params[1].detach().clone().requires_grad_())
    optimizer = opt8bit.Muon8bit(params, state_bits=bits)
    others = [opt8bit.Muon8bit([param], state_bits=bits) for param in alone]
    for seed in range(3):
        for number, (param, other) in enumerate(zip(params, alone, strict=True)):
            param.grad = other.grad = gradients(1, param.shape, 10 * seed + number)[0]
        optimizer.step()
        for each in others:
            each.step()
    assert sizes[:3] == [3, 2, 2]  # two together, the third, and the one of another shape
    for param, other, each in zip(params, alone, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-3, atol=1e-4)
        assert optimizer.state[param].keys() == each.state[other].keys()
        for name, value in optimizer.state[param].items():
            assert torch.equal(value, each.state[other][name])


def test_8_bit_momentum_points_where_torchs_does() -> None:
    ours, theirs = parameter(shape=(128, 96)), parameter(shape=(128, 96))
    before = ours.detach().clone()
    grads = [torch.randn(128, 96, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    mine = opt8bit.Muon8bit([ours], weight_decay=0.0)
    train(mine, ours, grads)
    train(torch.optim.Muon([theirs], weight_decay=0.0), theirs, grads)
    assert mine.state[ours]["momentum_buffer_codes"].dtype == torch.uint8
    assert torch.cosine_similarity((ours - before).flatten(), (theirs - before).flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("shape", "hyper", "error", "message"),
    [
        ((4, 4, 4), {}, ValueError, "Muon only supports 2D parameters"),
        ((4, 4), {"adjust_lr_fn": "other"}, ValueError, "Adjust learning rate function other is not supported"),
        ((4, 4), {"ns_steps": 100}, ValueError, "ns_steps must be an integer from 0 to 99, got 100"),
        ((4, 4), {"ns_coefficients": (1.0, 2.0)}, ValueError, "ns_coefficients must be 3 numbers"),
        ((4, 4), {"ns_steps": 5.0}, ValueError, "ns_steps must be an integer"),
        ((4, 4), {"fused": True}, ValueError, "fused=True, but Muon's matrix products are torch's"),
        ((4, 4), {"momentum": -1}, ValueError, "momentum should be >= 0 but is: -1"),
    ],
)
def test_bad_arguments_are_refused(shape: tuple, hyper: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        opt8bit.Muon8bit([torch.nn.Parameter(torch.zeros(shape))], **hyper)
