"""Parameters whose channels lie last in memory are stepped where they are, to the bits of contiguous ones."""

from typing import Any

import pytest
import torch
from cases import CASES, MUON, Case, train, use
from torch import Tensor, nn

import opt8bit
from opt8bit.optim.in_memory import positions_of_channels

# Positions and channels in whole tiles and not, rows of one block and of many, of one part and of several.
SHAPES = [(8, 64, 3, 3), (5, 300, 3, 3), (70, 20, 4, 4), (3, 3, 7, 7), (2, 1100, 2, 2), (9, 17, 5), (2, 9, 2, 3, 4)]
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float16": (torch.float16, {}),
    "bfloat16, nearest": (torch.bfloat16, {}),
    "bfloat16, stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 3}),
    "bfloat16, compensated": (torch.bfloat16, {"compensation": True}),
}


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


EVERY_FORM = "AdamW8bit weight decay"


@pytest.mark.sampled(5)
@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "float32") for name, case in CASES.items() if case not in MUON.values()),
        *((EVERY_FORM, form) for form in FORMS if form != "float32"),
    ],
)
def test_the_same_bits_in_either_format(
    name: str, state_bits: int, form: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, kernels)
    case: Case = CASES[name]
    dtype, options = FORMS[form]
    shapes = SHAPES if name == EVERY_FORM else SHAPES[:3]
    both: list[tuple[Any, list[nn.Parameter]]] = []
    for layout in (channels_last, torch.clone):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(layout(torch.randn(shape, generator=generator).to(dtype))) for shape in shapes]
        optimizer = case.ours(params, **{"min_8bit_size": 0, **case.hyper, **options, "state_bits": state_bits})
        for _ in range(3):
            for param in params:
                param.grad = layout(torch.randn(param.shape, generator=generator).to(dtype))
            optimizer.step()
        both.append((optimizer, params))
    (one, mine), (other, theirs) = both
    for shape, param, expected in zip(shapes, mine, theirs, strict=True):
        assert not param.is_contiguous() and torch.equal(param, expected), shape
        states, wanted = one.state[param], other.state[expected]
        assert states.keys() == wanted.keys()
        assert all(torch.equal(states[key], wanted[key]) for key in wanted), shape


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(count: int) -> None:
    """Threads share a tensor by whole rows, which blocks and the work of a thread do not end with."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads, layout in ((count, channels_last), (1, torch.clone)):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            param = nn.Parameter(layout(torch.randn(61, 130, 3, 3)))
            train(opt8bit.AdamW8bit([param]), param, [layout(torch.randn(param.shape)) for _ in range(2)])
            results.append(param.detach())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_parameter_may_change_its_format() -> None:
    torch.manual_seed(0)
    model, plain = (nn.Conv2d(64, 64, 3, bias=False) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    optimizers = [opt8bit.AdamW8bit(each.parameters(), lr=1e-2) for each in (model, plain)]
    for step in range(4):
        order = torch.channels_last if step % 2 else torch.contiguous_format
        model.to(memory_format=order)  # type: ignore[call-overload]
        grad = torch.randn(model.weight.shape)
        model.weight.grad, plain.weight.grad = grad.contiguous(memory_format=torch.channels_last), grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(model.weight, plain.weight)


def test_which_are_read_where_they_are() -> None:
    x = torch.zeros(4, 6, 3, 5)
    last = x.to(memory_format=torch.channels_last)
    assert positions_of_channels(last, last) == 15
    assert positions_of_channels(last, x) == positions_of_channels(x, x) == 0
    assert positions_of_channels(last[:, ::2], last[:, ::2]) == positions_of_channels(x.mT, x.mT) == 0
    one = torch.zeros(4, 6, 1, 1).to(memory_format=torch.channels_last)
    assert positions_of_channels(one, one) == 0 and one.is_contiguous()
