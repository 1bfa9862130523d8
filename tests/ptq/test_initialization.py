"""Models that transformers initializes on loading, packed or not: their checkpoints say that it has to unpack."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGURATIONS, SIZES, make, token_ids

from opt8bit import ptq
from opt8bit.ptq.export.compressed_tensors import CompressedTensors
from opt8bit.ptq.export.initialization import asks_for_weights, needs_weights
from opt8bit.ptq.model.blocks import block_layers

MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nanochat": ("NanoChatForCausalLM", "NanoChatConfig", SIZES),
    "modernbert-decoder": (
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderConfig",
        {**{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}, "sliding_window": 8},
    ),
    "gpt_bigcode": (
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"vocab_size": SIZES["vocab_size"], "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
}
# Those whose initialization reaches into layers: any that is not skipped, or only that of modules which are not whole.
REACHING = ("nanochat", "mamba", "mamba2", "modernbert-decoder", "gpt_bigcode")
REACHING_BEFORE_5 = ("falcon_mamba", "recurrent_gemma")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, configuration in MORE.items():
        monkeypatch.setitem(CONFIGURATIONS, name, configuration)


def model_of(name: str) -> Any:
    model = make(name)
    return pytest.skip(f"transformers has no {name}") if model is None else model


def in_blocks(model: Any) -> list[str]:
    return [name for name, layer in block_layers(model).items() if type(layer) is torch.nn.Linear]


@pytest.mark.parametrize("name", [*REACHING, *REACHING_BEFORE_5])
def test_what_initialization_reaches_into_is_unpacked_on_loading(name: str, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model, ids = model_of(name), token_ids(4, 16)
    assert needs_weights(model, in_blocks(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that stay as they are
        result = ptq.compress(model, ids, bits=8, group_size=None, symmetric=True, method=ptq.RTN())
        if name in REACHING_BEFORE_5 and int(transformers.__version__.partition(".")[0]) < 5:
            with pytest.raises(ValueError, match=f"cannot load models of type {name} with packed weights"):
                ptq.export(result, tmp_path / "out")
            return
        path = ptq.export(result, tmp_path / "out")
        assert json.loads((path / "config.json").read_text())["quantization_config"]["dequantize"] is True
        assert ptq.verify(path).is_right


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_others_stay_packed(name: str) -> None:
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not needs_weights(model, in_blocks(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_without_packed_weights_are_asked_for_nothing() -> None:
    model = model_of("mamba2")
    assert needs_weights(model, ["backbone.layers.1.mixer.out_proj"])
    assert not needs_weights(model, ["backbone.layers.0.mixer.in_proj"])


def test_a_tower_beside_the_blocks_is_left_out_under_any_names(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that stay as they are
        options: dict[str, Any] = {"bits": 8, "group_size": None, "symmetric": True, "method": ptq.RTN()}
        result = ptq.compress(model_of("gemma3"), token_ids(4, 16), **options)
        path = ptq.export(result, tmp_path / "out")
    ignored = json.loads((path / "config.json").read_text())["quantization_config"]["ignore"]
    (tower,) = (name.removeprefix("re:") for name in ignored if name.startswith("re:"))
    for name in ("vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"):
        assert re.match(tower, name)
    assert not any(re.match(tower, row.name) for row in result.report)
    assert not any("vision_tower" in name for name in ignored if not name.startswith("re:"))


def reading(model: Any, name: str) -> Any:
    """A model that reads the weight of a layer in each pass, beside calling it."""

    def read(module: Any, args: Any, kwargs: Any) -> None:
        assert module.get_submodule(name).weight.dim() == 2

    model.register_forward_pre_hook(read, with_kwargs=True)
    return model


def test_a_pass_that_reads_a_weight_is_told_from_one_that_calls_layers() -> None:
    model = make("llama")
    names = in_blocks(model)
    assert not asks_for_weights(model, names)
    before = {name: param.data_ptr() for name, param in model.named_parameters()}
    assert asks_for_weights(reading(model, names[0]), names)
    assert not asks_for_weights(model, names[1:])
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == before


@pytest.mark.filterwarnings("ignore:not every server runs:UserWarning")
def test_a_model_that_reads_weights_is_to_be_unpacked_by_transformers_4_too() -> None:
    plain, read = make("llama"), make("llama")
    reading(read, in_blocks(read)[0])
    headers = [
        CompressedTensors().quantization(ptq.compress(model, token_ids(4, 16), group_size=16, method=ptq.RTN()))
        for model in (plain, read)
    ]
    assert "run_compressed" not in headers[0] and headers[1]["run_compressed"] is False
