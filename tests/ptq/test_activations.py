"""Quantizers of what layers see."""

from typing import Any

import pytest
import torch
from toys import MODELS, shaken, token_ids

from opt8bit.ptq.activations.per_tensor import StaticPerTensor
from opt8bit.ptq.activations.quantizer import calibrated, with_quantized_inputs
from opt8bit.ptq.model.blocks import block_layers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_the_nearest_of_an_even_grid(bits: int, symmetric: bool) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    quantizer = StaticPerTensor(bits, symmetric=symmetric)
    for part in x.split(16):  # the range is that of all parts
        quantizer.observe(part)
    found = quantizer(x)
    low, high = min(float(x.min()), 0.0), float(x.max())
    low, high = (-max(high, -low), max(high, -low)) if symmetric else (low, high)
    step = (high - low) / (2**bits - 1)
    assert found.unique().numel() <= 2**bits
    inside = x < x.max() - step / 2 if symmetric else torch.ones_like(x, dtype=torch.bool)  # its last code is below
    assert float((found - x)[inside].abs().max()) <= step * 0.501
    assert float(quantizer.params.scale) == pytest.approx(step)
    assert torch.equal(quantizer(found), found)


def test_what_lies_beyond_is_clipped() -> None:
    quantizer = StaticPerTensor(8)
    quantizer.observe(torch.tensor([-1.0, 2.0]))
    assert torch.allclose(quantizer(torch.tensor([-50.0, 50.0])), torch.tensor([-1.0, 2.0]), atol=0.01)


def test_nothing_observed_nothing_rounded() -> None:
    with pytest.raises(ValueError, match="must observe inputs before it rounds any"):
        StaticPerTensor()(torch.zeros(3))
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 9"):
        StaticPerTensor(9)
    quantizer = StaticPerTensor()
    quantizer.observe(torch.zeros(0, 3))
    for spoiled in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="an input is not finite"):
            quantizer.observe(torch.tensor([1.0, spoiled]))
    with pytest.raises(ValueError, match="must observe inputs before it rounds any"):
        quantizer(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_keep_their_dtype(dtype: torch.dtype) -> None:
    quantizer = StaticPerTensor(8)
    x = torch.linspace(-2, 3, 50).to(dtype)
    quantizer.observe(x)
    assert quantizer(x).dtype == dtype


def test_states_are_saved_and_loaded() -> None:
    quantizer, other = StaticPerTensor(4), StaticPerTensor(4)
    quantizer.observe(torch.linspace(-2, 3, 50))
    other.load_state_dict(quantizer.state_dict())
    x = torch.linspace(-4, 4, 20)
    assert torch.equal(other(x), quantizer(x))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_with_quantized_inputs_is_near_what_it_was(name: str) -> None:
    model: Any = shaken(MODELS[name]())
    ids = token_ids(8, 16)
    batches = [{"input_ids": part} for part in ids.split(4)]
    errors = []
    with torch.no_grad():
        expected = model(ids).logits
        for bits in (8, 4):
            quantizers = calibrated(model, batches, lambda bits=bits: StaticPerTensor(bits))
            assert quantizers.keys() == block_layers(model).keys()
            found: Any = with_quantized_inputs(model, quantizers)
            errors.append(float((found(ids).logits - expected).norm() / expected.norm()))
        assert torch.equal(model(ids).logits, expected)
    assert errors[0] < 0.05 and 4 * errors[0] < errors[1] < 0.9
    assert not any(layer._forward_pre_hooks for layer in block_layers(model).values())
