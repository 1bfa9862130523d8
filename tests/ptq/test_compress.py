"""The pipeline on small random models of each type: what it finds, what it leaves alone, what it refuses."""

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import MODELS, PLACES, WRITERS, assert_same_changes, quantized, token_ids

from opt8bit import ptq
from opt8bit.ptq import block as blockwise
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.compressed import Compressed
from opt8bit.ptq.correction.value_biases import value_bias_through
from opt8bit.ptq.model.anatomy import anatomy
from opt8bit.ptq.model.bias_places import Place
from opt8bit.ptq.model.blocks import evaluating, find_blocks, linear_layers, matrix
from opt8bit.ptq.model.recording import block_calls
from opt8bit.ptq.model.rehearsal import rehearse
from opt8bit.ptq.model.source import InMemory
from opt8bit.ptq.report import write_probe
from opt8bit.ptq.result import install
from opt8bit.ptq.tasks.causal_lm import CausalLM
from opt8bit.quant import CodebookGrid, UniformGrid, normal_float

every_model = pytest.mark.parametrize("name", MODELS)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in module.__dict__


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, **more).logits


@every_model
def test_every_linear_layer_of_the_blocks_is_compressed(name: str) -> None:
    model = MODELS[name]()
    before = parameters(model)
    result = ptq.compress(model, token_ids(), bits=4, group_size=16, batch_size=4)
    assert_untouched(model, before)
    prefix, blocks = find_blocks(model)
    expected = {f"{prefix}.{i}.{layer}" for i, block in enumerate(blocks) for layer in linear_layers(block)}
    assert len(blocks) == 2 and result.changes.keys() == {f"{layer}.weight" for layer in expected}
    assert {row.name for row in result.report} == expected
    compressed = dict(result.compressed_model().named_modules())
    for layer in expected:
        assert torch.equal(matrix(compressed[layer]), quantized(result, layer).dequantize())
    changed = {key for key, value in compressed[""].named_parameters() if not torch.equal(value, before[key])}
    assert changed == {f"{layer}.weight" for layer in expected}


@every_model
def test_fewer_bits_are_worse_and_eight_are_nearly_exact(name: str) -> None:
    model, ids = MODELS[name](), token_ids()
    exact = logits(model, ids)
    errors = []
    for bits in (2, 4, 8):
        result = ptq.compress(model, ids, bits=bits, group_size=16)
        errors.append(float((logits(result.compressed_model(), ids) - exact).norm() / exact.norm()))
    assert errors[2] < 0.02 and errors[2] < errors[1] < errors[0]


@every_model
def test_biases_go_where_the_architecture_holds_them(name: str) -> None:
    recipe = {"bits": 3, "group_size": 16, "bias_correction": "sequential", "error_propagation": 0.0}
    result = ptq.compress(MODELS[name](), token_ids(), **recipe)
    for row in result.report:
        parent, _, last = row.name.rpartition(".")
        expected = None if last == "k_proj" else PLACES[name].get(last, "own")  # keys get none, wherever they could
        assert row.bias_place == (expected and expected.replace("through ", f"through {parent}."))
        assert (row.bias_norm > 0) == (expected is not None)
        assert bool(row.note) == (expected is None) or "does not use it" in row.note  # a server
        assert row.error_corrected <= row.error_rounded


@pytest.mark.sampled(5)
@every_model
def test_batches_of_any_size_give_the_same(name: str) -> None:
    model, ids = MODELS[name]().double(), token_ids()
    results = [ptq.compress(model, ids, bits=3, group_size=16, batch_size=size) for size in (1, 10)]
    for row in results[0].report:
        first, second = (quantized(result, row.name).parts[0].codes for result in results)
        assert torch.equal(first, second)


@pytest.mark.sampled(5)
@every_model
def test_padding_does_not_count(name: str) -> None:
    """Sequences with tokens behind them that are masked compress like the sequences alone."""
    model, ids = MODELS[name]().double(), token_ids()
    padded = torch.cat([ids, torch.full((10, 4), 7)], 1)
    mask = torch.ones_like(padded)
    mask[:, 24:] = 0
    alone = ptq.compress(model, [{"input_ids": ids, "attention_mask": mask[:, :24]}], bits=3, group_size=16)
    with_padding = ptq.compress(model, [{"input_ids": padded, "attention_mask": mask}], bits=3, group_size=16)
    for row in alone.report:
        codes, with_padding_codes = (quantized(result, row.name).parts[0].codes for result in (alone, with_padding))
        assert torch.equal(codes, with_padding_codes)


@pytest.mark.parametrize("correct", ["local", "sequential", "joint"])
def test_correcting_lowers_the_error_of_every_layer(correct: str) -> None:
    result = ptq.compress(
        MODELS["opt"](), token_ids(), bits=2, group_size=None, bias_correction=correct, error_propagation=0.0
    )
    for row in result.report:
        if correct != "local":
            assert row.error_corrected <= row.error_rounded
        elif not row.name.endswith("fc2"):  # whose bias is from the error of the whole block
            assert row.error_corrected <= row.error_rounded * 1.05
    assert sum(row.error_corrected for row in result.report) < sum(row.error_rounded for row in result.report)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_folding_biases_leaves_the_function_of_the_hooked_model(statistic: str) -> None:
    """Value biases that went through the output projection do what a bias on the values would have done."""
    model, ids = MODELS["gpt_neo"](), token_ids()
    result = ptq.compress(model, ids, bits=3, group_size=16, bias_correction="sequential", statistic=statistic)
    hooked = copy.deepcopy(model)
    modules = dict(hooked.named_modules())
    folded = 0
    with torch.no_grad():
        install(hooked, result.changes)
        for name, place in result.places.items():
            if place and place.kind == "through":
                output: Any = modules[place.name]
                shift = torch.randn(32, generator=torch.Generator().manual_seed(3))
                before = logits(hooked, ids)
                handle = modules[name].register_forward_hook(lambda module, args, out, shift=shift: out + shift)
                with_hook = logits(hooked, ids)
                handle.remove()
                output.bias += matrix(output) @ shift
                torch.testing.assert_close(logits(hooked, ids), with_hook, rtol=1e-4, atol=1e-5)
                assert not torch.allclose(before, with_hook)
                assert f"{name}.bias" not in result.changes and f"{place.name}.bias" in result.changes
                folded += 1
    assert folded == 2


def test_a_value_bias_goes_through_heads_that_share_values() -> None:
    model, ids = MODELS["llama"](), token_ids()
    values, output = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for name in (values, output):
        weight = matrix(model.get_submodule(name))
        rounded = ptq.RTN().round(weight, InputStatistics(), ptq.WeightScheme(UniformGrid(3)))
        layer = Compressed(rounded, torch.float32, None, None)
        layers[name] = layer.corrected(torch.randn(len(weight), generator=generator))
    results = []
    for place in (None, Place("through", output)):
        value_bias_through({values: place}, layers, model)
        changed = copy.deepcopy(model)
        for name, layer in layers.items():
            install(changed.get_submodule(name), layer.changes)
        results.append(logits(changed, ids))
    assert layers[values].bias is None and "bias" not in layers[values].changes
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_biases_by_position_do_not_go_through_attention() -> None:
    result = ptq.compress(
        MODELS["gpt_neo"](), token_ids(), bits=3, group_size=16, bias_correction="sequential", statistic="position"
    )
    values = [row for row in result.report if row.name.endswith("v_proj")]
    assert values and all(row.bias_place is None and row.note for row in values)
    logits(result.compressed_model(), token_ids())


def test_a_bias_that_another_layer_holds_takes_no_bytes() -> None:
    result = ptq.compress(MODELS["gpt_neo"](), token_ids(), bits=3, group_size=16, bias_correction="sequential")
    rows = {row.name.rpartition(".")[2]: row for row in result.report}
    assert rows["v_proj"].bias_place == "through transformer.h.1.attn.attention.out_proj"
    assert {row.bias_bytes for row in result.report} == {0}


def test_models_that_a_configuration_alone_does_not_make_have_no_switches() -> None:
    from transformers import LlamaForCausalLM

    class Extended(LlamaForCausalLM):
        def __init__(self, config, extra) -> None:
            super().__init__(config)

    model = Extended(MODELS["llama"]().config, "more")
    result = ptq.compress(model, token_ids(), group_size=16, bias_correction="sequential")
    assert all(row.bias_place is None and row.note for row in result.report)


def test_by_position_applies_a_bias_at_each_position_and_counts_its_bytes() -> None:
    model, ids = MODELS["llama"](), token_ids()
    result = ptq.compress(model, ids, bits=2, group_size=16, bias_correction="sequential", statistic="position")
    row = result.report[0]
    assert row.bias_bytes == 24 * row.shape[0] * 4
    bias = result.changes[f"{row.name}.bias"]
    assert isinstance(bias, torch.Tensor) and bias.shape == (24, row.shape[0])
    module = dict(result.compressed_model().named_modules())[row.name]
    x = torch.randn(2, 24, row.shape[1])
    torch.testing.assert_close(module(x), x @ matrix(module).T + bias)
    torch.testing.assert_close(module(x[:, :7]), x[:, :7] @ matrix(module).T + bias[:7])
    torch.testing.assert_close(module(x.flatten(0, 1)).view(2, 24, -1), module(x))
    for longer in (torch.randn(1, 25, row.shape[1]), torch.randn(25, row.shape[1])):
        with pytest.raises(ValueError, match="biases by position are for sequences of 24 tokens"):
            module(longer)


def test_layers_that_read_the_same_input_go_together() -> None:
    model = MODELS["llama"]()
    _, blocks = find_blocks(model)
    with evaluating(model):
        call = block_calls(model, blocks, {"input_ids": token_ids()})[0]
        found = anatomy(blocks[0], call).stages
    attention, mlp = "self_attn.", "mlp."
    assert found == [
        [attention + part for part in ("q_proj", "k_proj", "v_proj")],
        [attention + "o_proj"],
        [mlp + "gate_proj", mlp + "up_proj"],
        [mlp + "down_proj"],
    ]


@every_model
def test_layers_that_add_to_the_hidden_states_are_told_by_trial(name: str) -> None:
    model = MODELS[name]()
    before = parameters(model)
    prefix, blocks = find_blocks(model)
    with evaluating(model):
        batch = {"input_ids": token_ids()}
        calls = rehearse(InMemory(model), prefix, blocks, batch).calls(model, blocks, CausalLM().smallest(batch))
        for block, call in zip(blocks, calls, strict=True):
            found, layers = anatomy(block, call), linear_layers(block)
            assert found.writers == {layer for layer in layers if layer.rpartition(".")[2] in WRITERS[name]}
            assert found.writers <= layers.keys()
            assert found.overwritten == ({"mlp.dense_4h_to_h"} if name.startswith("falcon") else set())
    assert_untouched(model, before)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {"bias_correction": correct})
            for name in MODELS
            if WRITERS[name]
            for correct in ("none", "sequential")
        ),
        ("llama", {"overrides": {"*.o_proj": None}}),
        ("falcon", {"overrides": {"*.self_attention.*": None}}),
    ],
)
def test_what_a_writer_should_put_out_makes_up_for_the_whole_drift(name: str, options: dict, monkeypatch) -> None:
    """Behind the block the streams differ by what its last writer should put out and does not."""
    last: list[tuple[Any, ...]] = []
    blocks: list[int] = []
    compress_stage, run = blockwise.compress_stage, blockwise.BlockTask.run

    def watched_stage(layers, inputs, *args):
        done = compress_stage(layers, inputs, *args)
        if inputs[0].wanted is not None:
            assert len(layers) == 1
            last[:] = [(list(inputs), *done.values())]
        return done

    def watched_run(task, calls):
        streams = run(task, calls)
        [(inputs, layer)] = last
        for batch, exact, compressed in zip(inputs, *(ends[: len(inputs)] for ends in streams), strict=True):
            missing = batch.wanted - batch.x_hat @ layer.installed.T
            torch.testing.assert_close(
                exact - compressed, missing if layer.shift is None else missing - layer.shift, rtol=0, atol=1e-10
            )
            assert missing.abs().max() > 1e-3
        blocks.append(len(inputs))
        return streams

    monkeypatch.setattr(blockwise, "compress_stage", watched_stage)
    monkeypatch.setattr(blockwise.BlockTask, "run", watched_run)
    model = MODELS[name]().double()
    ptq.compress(model, token_ids(), bits=2, group_size=16, error_propagation=0.7, batch_size=4, **options)
    assert blocks == [3, 3]


@pytest.mark.parametrize("name", ["opt", "llama", "falcon"])
def test_the_hidden_states_drift_less_where_their_drift_is_made_up_for(name: str, monkeypatch) -> None:
    """Against the same target without the drift: the streams are closer after the last block."""
    model, ids = MODELS[name](), token_ids(40)
    errors = []
    for writers in (None, lambda block, call: set()):
        if writers is not None:
            monkeypatch.setattr("opt8bit.ptq.model.anatomy.stream_writers", writers)
        result = ptq.compress(model, ids, bits=2, group_size=16, error_propagation=1.0)
        errors.append(float((logits(result.compressed_model(), ids) - logits(model, ids)).norm()))
    assert errors[0] < 0.97 * errors[1]


def test_modules_that_run_a_function_of_their_own_go_on_running_it() -> None:
    """Libraries that move weights between devices put one into the module itself."""
    model = MODELS["llama"]()
    block = model.model.layers[0]
    calls: list[str] = []

    def forward(name, own, *args, **kwargs):
        calls.append(name)
        return own(*args, **kwargs)

    for name, module in (("block", block), ("layer", block.mlp.down_proj)):
        module.forward = functools.partial(forward, name, module.forward)
    ptq.compress(model, token_ids(), group_size=16)
    calls.clear()
    model(token_ids())
    assert calls == ["block", "layer"]


@pytest.mark.parametrize("architecture", ["opt", "falcon"])
def test_reported_errors_are_those_of_the_outputs(architecture: str) -> None:
    """With the bias and without; Falcon adds to its MLP's output in place."""
    model, ids = MODELS[architecture](), token_ids()
    mask = torch.ones_like(ids)
    mask[2, 10:] = 0
    batches = [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in torch.arange(10).split(4)]
    result = ptq.compress(model, batches, bits=2, group_size=16, bias_correction="sequential", error_propagation=0.0)
    outputs: list[dict[str, torch.Tensor]] = []
    for network in (model, result.compressed_model()):
        seen: dict[str, torch.Tensor] = {}
        for name, module in network.named_modules():
            if f"{name}.weight" in result.changes:
                module.register_forward_hook(
                    lambda module, args, output, name=name, seen=seen: seen.update({name: output.clone()})
                )
        logits(network, ids, attention_mask=mask)
        outputs.append({name: output.view(*ids.shape, -1)[mask.bool()] for name, output in seen.items()})
    for row in result.report:
        y, y_hat = (seen[row.name] for seen in outputs)
        bias: Any = result.changes.get(f"{row.name}.bias")
        assert (bias is None) == row.name.endswith("k_proj")
        had: Any = model.get_submodule(row.name).bias
        shift = torch.zeros(()) if bias is None else bias - (0 if had is None else had.detach())
        signal = y.square().sum()
        assert row.error_corrected == pytest.approx(float((y - y_hat).square().sum() / signal), rel=1e-3)
        assert row.error_rounded == pytest.approx(float((y - y_hat + shift).square().sum() / signal), rel=1e-3)


def test_the_report_is_given_as_layers_are_done() -> None:
    seen: list[tuple[str, int]] = []
    result = ptq.compress(
        MODELS["llama"](), token_ids(), group_size=16, see=lambda row, count: seen.append((row.name, count))
    )
    assert seen == [(row.name, 14) for row in result.report]


def test_values_stay_uncorrected_where_their_output_is_left_as_it_is() -> None:
    overrides = {"*.out_proj": None}
    result = ptq.compress(
        MODELS["gpt_neo"](), token_ids(), group_size=16, bias_correction="sequential", overrides=overrides
    )
    rows = {row.name.rpartition(".")[2]: row for row in result.report}
    assert "out_proj" not in rows and rows["v_proj"].note == "the checkpoint has no place for a bias here"


def test_overrides_are_checked_and_the_last_one_is_meant() -> None:
    model, ids = MODELS["llama"](), token_ids()
    grid = CodebookGrid(normal_float(4))
    overrides = {
        "*.q_proj": None,
        "*_proj": {"bits": 2},
        "*.down_proj": {"grid": grid},
        "*.0.*.up_proj": {"method": ptq.RTN()},
    }
    result = ptq.compress(model, ids, bits=3, group_size=16, overrides=overrides)
    grids = {row.name.split(".", 3)[-1]: quantized(result, row.name).parts[0].grid for row in result.report}
    assert grids["mlp.down_proj"] is grid and grids["self_attn.q_proj"].bits == 2
    for wrong, message in (
        ({"*.q_proj": 8}, r"overrides\['\*.q_proj'\] must be a mapping of options, or None, got 8"),
        ({"*.q_proj": {"width": 8}}, r"'width' is none of method, bits, group_size, .*, act_order, grid"),
        ({"*.q_proj": {"bits": 3, "grid": grid}}, r"overrides\['\*.q_proj'\]: bits, symmetric and range are those of"),
        ({"*.q_proj": {"group_size": 48}}, "layers.0.self_attn.q_proj: group_size must be a positive divisor"),
        ({"*.z_proj": None}, "fits no layer"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ptq.compress(model, ids, group_size=16, overrides=wrong)  # type: ignore[arg-type]


def test_a_codebook_serves_as_a_grid() -> None:
    result = ptq.compress(
        MODELS["llama"](), token_ids(), method=ptq.GPTQ(), grid=CodebookGrid(normal_float(4)), group_size=16
    )
    assert all(row.bits_per_weight == 6 for row in result.report)


def test_training_mode_and_gradients_are_as_before() -> None:
    model = MODELS["opt"]().train()
    model.model.decoder.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    ptq.compress(model, token_ids(), group_size=16)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_keep_their_dtype_and_are_corrected_as_they_will_be(dtype: torch.dtype) -> None:
    """The bias makes up for what the stored weight does, which has been rounded once more."""
    model = MODELS["opt"]().to(dtype)
    result = ptq.compress(
        model, token_ids(40), bits=8, bias_correction="sequential", group_size=16, error_propagation=0.0
    )
    assert {param.dtype for param in result.compressed_model().parameters()} == {dtype}
    name = result.report[0].name
    inputs: list[torch.Tensor] = []
    module: Any = dict(model.named_modules())[name]
    module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    logits(model, token_ids(40))
    installed = quantized(result, name).dequantize().to(dtype).double()
    mean = inputs[0].flatten(0, 1).mean(0) @ (matrix(module).double() - installed).T
    bias: Any = result.changes[f"{name}.bias"]
    assert (mean - (bias - module.bias.detach())).norm() < 0.5 * mean.norm()


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_padding_on_the_left_does_not_count(name: str) -> None:
    model, ids = MODELS[name]().double(), token_ids()
    padded = torch.cat([torch.full((10, 4), 7), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    alone = ptq.compress(model, [{"input_ids": ids}], bits=3, group_size=16)
    with_padding = ptq.compress(model, [batch], bits=3, group_size=16)
    for row in alone.report:
        codes, with_padding_codes = (quantized(result, row.name).parts[0].codes for result in (alone, with_padding))
        assert torch.equal(codes, with_padding_codes)


def model_with(change: str) -> nn.Module:
    model = MODELS["llama"]()
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[3, 4] = {"nan": float("nan"), "inf": float("inf"), "": weight[3, 4]}[change]
    if change == "":
        model.model.layers[0].post_attention_layernorm.weight.data[5] = float("nan")
    return model


@pytest.mark.parametrize("change", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_before_anything_is_done(change: str) -> None:
    seen: list[object] = []
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: a weight is not finite"):
        ptq.compress(model_with(change), token_ids(), group_size=16, see=lambda *row: seen.append(row))
    assert not seen


def test_activations_that_are_not_finite_name_their_layer() -> None:
    model = model_with("")
    before = [name for name, module in model.named_modules() if module.training]
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.gate_proj: an input is not finite"):
        ptq.compress(model, token_ids(), group_size=16)
    assert before == [name for name, module in model.named_modules() if module.training]
    for module in model.modules():
        assert not module._forward_pre_hooks and "forward" not in module.__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 48}, r"^model.layers.0.self_attn.q_proj: group_size must be a positive divisor of the 32"),
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"range": "full"}, "range must be one of minmax, mse, got 'full'"),
        ({"bias_correction": "global"}, "bias_correction must be one of none, local, sequential, joint, got 'global'"),
        (
            {"statistic": "mode", "bias_correction": "local"},
            "statistic must be one of mean, median, position, got 'mode'",
        ),
        ({"statistic": "median"}, "statistic='median' has no bias to serve: bias_correction is 'none'"),
        ({"statistic": "median", "bias_correction": "joint"}, "bias_correction='joint' is least squares"),
        ({"error_propagation": 1.5}, "error_propagation must be from 0 to 1, got 1.5"),
        ({"error_propagation": 0.5, "method": ptq.RTN()}, "looks at no inputs: error_propagation must be 0"),
        ({"grid": CodebookGrid(normal_float(4)), "bits": 3}, "bits, symmetric and range are those of grid="),
        (
            {"method": ptq.RTN(), "bias_correction": "joint"},
            "looks at no inputs: with bias_correction='joint' it would round as ever",
        ),
        ({"bias_correction": "local", "error_propagation": 0.5}, "would undo what the asymmetric target does"),
        ({"symmetric": "no"}, "symmetric must be true or false or 'restricted', got 'no'"),
        ({"range": ""}, "range must be one of minmax, mse, got ''"),
        ({"error_propagation": "0.5"}, "error_propagation must be a number, got '0.5'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ptq.compress(MODELS["llama"](), token_ids(), **{"group_size": 16, **options})  # type: ignore[arg-type]


def test_types_are_checked() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module, or ptq.Checkpoint\(folder\), got 'a/folder'"):
        ptq.compress("a/folder", token_ids())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="overrides must be a mapping from patterns of names to options, got"):
        ptq.compress(MODELS["llama"](), token_ids(), group_size=16, overrides=[{"layers": "*"}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.full((2, 8), 96), "calibration must be below the vocabulary's 96, got 96 to 96"),
        (torch.zeros(2, 129, dtype=torch.int64), "calibration may be 128 tokens long"),
        ([{"input_ids": token_ids()[0]}], "input_ids of calibration's batch 0 must be int64 token ids"),
        (
            [{"input_ids": token_ids(2), "attention_mask": torch.zeros(2, 24)}],
            "attention_mask of calibration's batch 0 leaves no token that counts",
        ),
    ],
)
def test_token_ids_are_checked_against_the_model(calibration: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ptq.compress(MODELS["llama"](), calibration, group_size=16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 24, 24)}, r"\(sequences, length\) as input_ids, \(2, 24\), got"),
        ({"attention_mask": torch.ones(1, 24)}, r"got shape \(1, 24\)"),
        ({"position_ids": torch.arange(24)[None]}, r"\(sequences, length, \.\.\.\) as input_ids"),
        ({"num_items": torch.tensor(3)}, r"got shape \(\)"),
        ({"attention_mask": None}, "a tensor, got NoneType"),
        ({"text": ["a", "b"]}, "a tensor, got list"),
        ({"input_ids": token_ids(2) + 96}, "below the vocabulary's 96"),
    ],
)
@pytest.mark.parametrize("argument", ["calibration", "held_out"])
def test_everything_in_a_batch_is_checked(argument: str, more: dict[str, object], message: str) -> None:
    [key] = more
    batches = [{"input_ids": token_ids(2)}, {"input_ids": token_ids(2), **more}]
    texts = {"calibration": token_ids(), argument: batches}
    with pytest.raises((TypeError, ValueError), match=rf"^{key} of {argument}'s batch 1 must be .*{message}"):
        ptq.compress(MODELS["llama"](), **texts, group_size=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("calibration", [None, {"input_ids": token_ids()}, [token_ids()]])
def test_calibration_is_a_tensor_or_batches(calibration: object) -> None:
    expected = r"^calibration must be one tensor of token ids \(samples, length\), or mappings that have input_ids, got"
    with pytest.raises(TypeError, match=expected):
        ptq.compress(MODELS["llama"](), calibration, group_size=16)  # type: ignore[arg-type]


def test_what_tokenizers_return_is_taken() -> None:
    from transformers import BatchEncoding

    model, ids = MODELS["llama"](), token_ids()
    encoded = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": 0 * ids})
    result = ptq.compress(model, [encoded], group_size=16, held_out=[encoded])
    expected = ptq.compress(model, ids, group_size=16, batch_size=10)
    assert_same_changes(result, expected)


def test_what_shares_memory_is_copied_for_the_probe(tmp_path: Path) -> None:
    ids = token_ids()
    result = ptq.compress(MODELS["llama"](), [{"input_ids": ids, "labels": ids}], group_size=16)
    assert result.probe is not None
    write_probe(result.probe, tmp_path)
    assert torch.equal(load_file(tmp_path / "opt8bit" / "probe.safetensors")["labels"], ids[:1])


def test_padding_predicts_nothing() -> None:
    """Held-out text is as good with padding on its left as without."""
    model, ids = MODELS["llama"](), token_ids(2)
    padded, mask = (nn.functional.pad(tensor, (8, 0)) for tensor in (ids, torch.ones_like(ids)))
    alone = ptq.compress(model, token_ids(), group_size=16, held_out=ids).quality
    held_out = [{"input_ids": padded, "attention_mask": mask}]
    with_padding = ptq.compress(model, token_ids(), group_size=16, held_out=held_out).quality
    assert alone is not None and with_padding is not None and alone.tokens == with_padding.tokens == 46
    assert with_padding.perplexity == pytest.approx(alone.perplexity, rel=1e-4)


def test_matrices_that_are_in_no_linear_layer_are_told() -> None:
    model = MODELS["llama"]()
    for block in model.model.layers:
        block.mlp.experts = nn.Parameter(torch.zeros(2, 4, 8))
        block.mlp.scales = nn.Parameter(torch.zeros(8))
    expected = (
        r"^128 of the blocks' 18,560 weights are in no nn.Linear or Conv1D layer and stay as they are: "
        r"model.layers.0.mlp.experts, model.layers.1.mlp.experts$"
    )
    with pytest.warns(UserWarning, match=expected) as told:
        result = ptq.compress(model, token_ids(), group_size=16)
    assert len(told) == 1 and told[0].filename == __file__ and len(result.report) == 14


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = MODELS["llama"]()
    model.model.layers[1].to("meta")
    expected = r"^model\.layers\.1\.self_attn\.q_proj\.weight is on the meta device.*ptq\.Checkpoint"
    with pytest.raises(ValueError, match=expected):
        ptq.compress(model, token_ids(), group_size=16)
    with pytest.raises(ValueError, match=r"^model\.embed_tokens\.weight is on the meta device"):
        ptq.compress(model.to("meta"), [{"input_ids": token_ids()}], group_size=16)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_outside_the_blocks_are_finite_too(name: str) -> None:
    model = MODELS["llama"]()
    model.get_parameter(name).data[0] = float("nan")
    with pytest.raises(ValueError, match=f"^{name} is not finite"):
        ptq.compress(model, token_ids(), group_size=16)


@pytest.mark.parametrize(
    "calibration",
    [torch.zeros(0, 8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), torch.zeros(2, 8), [], [{}]],
)
def test_calibration_is_checked(calibration: object) -> None:
    with pytest.raises(ValueError, match=r"calibration must be (int64 )?token ids \(samples, length\)"):
        ptq.compress(MODELS["llama"](), calibration, group_size=16)  # type: ignore[arg-type]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no blocks found in Sequential: expected an nn\.ModuleList of modules that each"
    ):
        ptq.compress(nn.Sequential(nn.Linear(4, 4)), token_ids())


def test_a_plain_model_of_ones_own_is_compressed() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(16, 32, bias=False), nn.Linear(32, 16)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.outer(self.inner(hidden).relu())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                hidden = block(hidden)
            return self.head(hidden)

    result = ptq.compress(Model(), token_ids() % 50, bits=4, group_size=16, bias_correction="sequential")
    assert len(result.report) == 6
    assert {row.bias_place for row in result.report} == {"own", None}
    with pytest.raises(TypeError, match="only models of transformers can be exported, got Model"):
        ptq.export(result, Path("never"))


def test_a_model_spread_over_devices_is_refused() -> None:
    model = MODELS["llama"]()
    elsewhere = SimpleNamespace(is_meta=False, device=torch.device("cuda:1"))
    model.parameters = lambda: iter([torch.zeros(1), elsewhere])
    with pytest.raises(ValueError, match=r"^the model is spread over cpu, cuda:1: put it on one device$"):
        ptq.compress(model, token_ids(), group_size=16)


def test_torchs_default_device_has_no_say(tmp_path: Path) -> None:
    model, ids = MODELS["llama"](), token_ids()
    options: dict[str, Any] = {
        "bits": 4,
        "symmetric": True,
        "group_size": 16,
        "bias_correction": "sequential",
        "held_out": ids,
    }
    outliers: dict[str, Any] = {"overrides": {"*.down_proj": {"method": ptq.OutlierQuantEase(0.1)}}}
    for device in (None, "meta"):
        torch.set_default_device(device)
        try:
            result = ptq.compress(model, ids, **options, work=tmp_path / f"{device}")
            for name in ("dense", "compressed-tensors", "gptq"):
                ptq.export(result, tmp_path / f"{name} {device}", format=name)
            result = ptq.compress(model, ids, **options, **outliers, work=tmp_path / f"{device}, outliers")
            ptq.export(result, tmp_path / f"outliers {device}", format="dense")
        finally:
            torch.set_default_device(None)
    for name in ("dense", "compressed-tensors", "gptq", "outliers"):
        files = [tmp_path / f"{name} {device}" / "model.safetensors" for device in (None, "meta")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_is_checked_by_a_sequence_in_a_batch_of_its_own() -> None:
    """Products of other shapes round otherwise, here by a hundredth for each sequence more."""
    model: Any = MODELS["llama"]()

    def rounded(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 0.01 * (len(output) - 1))

    model.model.layers[0].mlp.register_forward_hook(rounded)
    result = ptq.compress(model, token_ids(), group_size=16, held_out=token_ids(2))
    assert result.probe is not None and len(result.probe.inputs["input_ids"]) == 1
    with torch.no_grad():
        expected = result.compressed_model()(**result.probe.inputs).logits[0, -len(result.probe.logits) :]
    torch.testing.assert_close(result.probe.logits, expected, rtol=1e-5, atol=1e-6)
