"""Scales that a quantizer has moved from layer to layer are found, and moved in the float model as well."""

import copy
from typing import Any

import pytest
import torch
from packed_checkpoints import moved_scales, rounded
from toys import MODELS, shaken, token_ids

from opt8bit.ptq.model.blocks import evaluating
from opt8bit.ptq.model.running import Running
from opt8bit.ptq.pairs.rescaled import follow_scales, resemblance

FEW = {"input_ids": token_ids(1, 8)}
LINKS = ("input_layernorm", "mlp.up_proj", "post_attention_layernorm")


def quantized(model: Any, levels: int) -> Any:
    result = copy.deepcopy(model)
    for name, param in result.named_parameters():
        if param.dim() == 2 and ".layers." in name:
            param.data = rounded(param.data, levels=levels).values
    return result


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_moved_scales_are_followed(levels: int) -> None:
    model = shaken(MODELS["llama"]())
    rescaled = moved_scales(model)
    reference, hat = copy.deepcopy(model), quantized(rescaled, levels)
    with evaluating(reference), evaluating(hat):
        found = follow_scales(Running(hat), Running(reference), FEW)
        assert sorted(found.producers) == [f"model.layers.{i}.{name}" for i in range(2) for name in LINKS]
        assert not found.unknown
        torch.testing.assert_close(reference(**FEW).logits, model(**FEW).logits, rtol=1e-4, atol=1e-5)
    for name, param in rescaled.named_parameters():
        followed = reference.get_parameter(name)
        if param.dim() == 1:
            torch.testing.assert_close(followed, param)
        elif ".layers." in name:
            owner = name.removesuffix(".weight")
            likeness = resemblance(reference.get_submodule(owner), hat.get_submodule(owner))
            # As like as if all scales were known, up to what rounding hides of them.
            assert likeness > resemblance(rescaled.get_submodule(owner), hat.get_submodule(owner)) - 0.02


def test_what_is_only_rounded_is_left_as_it_is() -> None:
    model = shaken(MODELS["llama"]())
    reference, hat = copy.deepcopy(model), quantized(model, 4)
    found = follow_scales(Running(hat), Running(reference), FEW)
    assert found == ([], [])
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in model.state_dict().items())


def test_norms_that_have_changed_otherwise_are_told() -> None:
    model = shaken(MODELS["llama"]())
    reference, hat = copy.deepcopy(model), quantized(model, 16)
    hat.model.layers[1].input_layernorm.weight.data *= torch.linspace(0.5, 2, 32)
    with evaluating(reference), evaluating(hat):
        found = follow_scales(Running(hat), Running(reference), FEW)
    assert found == ([], ["model.layers.1"])
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in model.state_dict().items())
