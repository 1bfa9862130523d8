"""Layers whose weights have other dtypes than the others': their scales are of their own dtype."""

from typing import Any

import pytest
import torch
from toys import MODELS, quantized, token_ids

from opt8bit import ptq
from opt8bit.ptq.calibration.statistics import Inputs
from opt8bit.ptq.plan import LayerPlan
from opt8bit.ptq.stage import compress_stage
from opt8bit.quant.codebook import normal_float
from opt8bit.quant.codebook_grid import CodebookGrid
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import WeightScheme

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:not every server runs")
ODD = "model.layers.1.self_attn.q_proj"


def mixed(dtype: torch.dtype) -> Any:
    """A model of float32 with one layer that converts what it gets and what it gives."""
    model: Any = MODELS["llama"]()
    layer = model.get_submodule(ODD).to(dtype)
    layer.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    layer.register_forward_hook(lambda module, args, output: output.float())
    return model


@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
def test_scales_are_of_each_layers_own_dtype(format: str, tmp_path: Any) -> None:
    pytest.importorskip("compressed_tensors")
    overrides = {"*.q_proj": {"bits": 8}}
    result = ptq.compress(
        mixed(torch.bfloat16), token_ids(), group_size=16, symmetric=True, overrides=overrides, checkpoint_format=format
    )
    for row in result.report:
        own = result.plan.of(row.name)
        assert own is not None and isinstance(own.scheme.grid, UniformGrid)
        assert own.scheme.grid.scale_dtype == (torch.bfloat16 if row.name == ODD else torch.float32)
        assert own.scheme.grid.bits == (8 if row.name.endswith("q_proj") else 4)
    scale = quantized(result, ODD).parts[0].params.scale
    assert torch.equal(scale, scale.bfloat16().to(scale.dtype))
    out = ptq.export(result, tmp_path / "out", format=format)
    from safetensors.torch import load_file

    name = f"{ODD}.{'weight' if format == 'dense' else 'weight_scale'}"
    assert load_file(out / "model.safetensors")[name].dtype == torch.bfloat16


def test_a_layer_that_is_left_stays_left_whatever_its_dtype() -> None:
    result = ptq.compress(mixed(torch.bfloat16), token_ids(), group_size=16, overrides={ODD: None})
    assert ODD not in {row.name for row in result.report} and len(result.report) == 13


def test_dtypes_without_scales_are_refused_by_layer_before_the_work() -> None:
    model = mixed(torch.float64)
    message = rf"{ODD}: compressed-tensors has no scales of the weight's dtype, torch\.float64: convert the model first"
    with pytest.raises(ValueError, match=message):
        ptq.compress(model, token_ids(), group_size=16, checkpoint_format="compressed-tensors")
    assert len(ptq.compress(model, token_ids(), group_size=16, checkpoint_format="dense").report) == 14


def test_a_grid_that_is_given_is_taken_as_it_is() -> None:
    grid = CodebookGrid(normal_float(4), scale_dtype=torch.float16)
    result = ptq.compress(mixed(torch.bfloat16), token_ids(), group_size=16, grid=grid)
    assert {quantized(result, row.name).parts[0].grid for row in result.report} == {grid}


def test_layers_of_a_stage_keep_their_own_dtypes() -> None:
    layers = {"wide": torch.nn.Linear(16, 4).double(), "narrow": torch.nn.Linear(16, 4)}
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    plan = LayerPlan(ptq.RTN(), WeightScheme(UniformGrid(4), 16))
    done = compress_stage(dict(layers), [Inputs(x, x)], plan, set())
    assert {name: layer.installed.dtype for name, layer in done.items()} == {
        "wide": torch.float64,
        "narrow": torch.float32,
    }
