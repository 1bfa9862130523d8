"""Any shape, dtype, layout and options, at 32 bits, against the oracle in float64."""

from typing import Any

import torch
from cases import VARIANTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import opt8bit

# A step is computed in float32, in float64 for float64, each operation rounding by half an ulp of that; its result
# is rounded by half an ulp of the parameter's dtype. No rule has more than 16 operations on the way.
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}
SMALLEST = {torch.float32: 2**-149, torch.bfloat16: 2**-133, torch.float16: 2**-24, torch.float64: 2**-1074}

OURS = {f"{ours.__name__} {oracle.__name__}": (ours, oracle, variants) for ours, oracle, variants in VARIANTS}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int, bool]:
    """A shape, an order of its dimensions in memory, a step between elements, and whether it is expanded."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    return shape, order, draw(st.integers(1, 3)), draw(st.booleans())


def laid_out(values: Tensor, order: tuple[int, ...], step: int) -> Tensor:
    """The same values, stored in another order of dimensions, with gaps."""
    if not order:
        return values.clone()
    stored = values.permute(order).contiguous()
    spaced = torch.zeros(*stored.shape[:-1], stored.shape[-1] * step, dtype=values.dtype)[..., ::step]
    inverse = [order.index(i) for i in range(len(order))]
    return spaced.copy_(stored).permute(inverse)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(OURS)),
    variant=st.integers(0, 100),
    layout=layouts(),
    grad_layout=layouts(),
    dtype=st.sampled_from(list(HALF_ULP)),
    weight_decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_two_steps_equal_the_oracle(
    name: str,
    variant: int,
    layout: tuple[Any, ...],
    grad_layout: tuple[Any, ...],
    dtype: torch.dtype,
    weight_decay: float,
    maximize: bool,
    seed: int,
) -> None:
    ours, oracle, variants = OURS[name]
    hyper = {**list(variants.values())[variant % len(variants)], "weight_decay": weight_decay, "maximize": maximize}
    shape, order, step, _ = layout
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype)
    param = nn.Parameter(laid_out(values, order, step))
    exact = nn.Parameter(values.double())
    strides, address = param.stride(), param.data_ptr()
    mine, theirs = ours([param], state_bits=32, **hyper), oracle([exact], **hyper)
    _, grad_order, grad_step, is_expanded = grad_layout
    for _ in range(2):
        # Positive and away from zero, so that no terms cancel.
        grad = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
        if is_expanded and shape and shape[0]:
            grad = grad[:1].expand(shape)
        elif len(grad_order) == len(shape):
            grad = laid_out(grad, grad_order, grad_step)
        before = exact.detach().clone()
        param.grad, exact.grad = grad, grad.double()
        mine.step()
        theirs.step()
        lr = float(mine.defaults["lr"])
        terms = before.abs() + exact.abs() + lr * (2 + before.abs())
        if ours is opt8bit.RMSprop8bit:  # a gradient and its decay may cancel before a division by sqrt(1 - alpha)
            terms = terms + 100 * lr * (2 + before.abs())
        tolerance = HALF_ULP[dtype] * exact.abs() + 16 * min(HALF_ULP[dtype], 2**-24) * terms + SMALLEST[dtype]
        assert ((param.double() - exact).abs() <= tolerance).all()
        with torch.no_grad():  # rounding of the parameter is not to add up
            exact.copy_(param.double())
    assert param.stride() == strides and param.data_ptr() == address
    assert mine.state[param] == {} or mine.state[param]["step"].item() == 2
