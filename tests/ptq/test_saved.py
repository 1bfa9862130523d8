"""Names in checkpoints: those that ``save_pretrained`` writes, whatever a version of transformers calls them inside."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import GATED, SIZES, _make, token_ids

from opt8bit import ptq
from opt8bit.ptq.model.saved import check_packed, check_saved
from opt8bit.ptq.model.skeleton import OnlyWhole
from opt8bit.ptq.model.source import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

EXPERTS = {**GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
RENAMED = _make("GPTNeoX", **SIZES, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=False)
PUT_TOGETHER = {
    "mixtral": _make("Mixtral", **GATED, num_local_experts=4),
    "qwen2_moe": _make("Qwen2Moe", **EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    "qwen3_moe": _make("Qwen3Moe", **EXPERTS, num_experts=4, head_dim=8),
}
OVERRIDES = {"*.dense": {"bits": 8}}


@pytest.fixture
def loading() -> Any:
    """Where transformers renames and puts together what it loads; before version 5 it does neither for these models."""
    return pytest.importorskip("transformers.core_model_loading", exc_type=ImportError)


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.filterwarnings("ignore:.*weights are in no nn.Linear:UserWarning")
@pytest.mark.parametrize("name", PUT_TOGETHER)
def test_experts_are_written_one_by_one(name: str, loading: Any, tmp_path: Path) -> None:
    model = PUT_TOGETHER[name]()
    expected = saved(model, tmp_path / "model")
    result = ptq.compress(model, token_ids(), group_size=16)
    path = ptq.export(result, tmp_path / "out", format="dense")
    found = load_file(path / "model.safetensors")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    assert any("experts.3." in key for key in found)
    assert all(torch.equal(found[key], value) for key, value in expected.items() if "experts" in key)
    assert ptq.verify(path).is_right
    with pytest.raises(OnlyWhole):
        Checkpoint(path)


@pytest.mark.parametrize("name", PUT_TOGETHER)
def test_packed_weights_beside_experts_are_refused_before_the_work(name: str, loading: Any) -> None:
    for format in ("compressed-tensors", "gptq"):
        with pytest.raises(ValueError, match=rf"{name} have model\.layers\.0\.mlp\.experts.* use format 'dense'"):
            ptq.compress(PUT_TOGETHER[name](), token_ids(), bits=4, symmetric=True, checkpoint_format=format)


@pytest.mark.parametrize("overrides", [None, OVERRIDES], ids=["one-width", "two-widths"])
@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
def test_renamed_tensors_have_their_names(format: str, overrides: Any, tmp_path: Path) -> None:
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    model = RENAMED()
    expected = saved(model, tmp_path / "model")
    result = ptq.compress(model, token_ids(), symmetric=True, group_size=16, overrides=overrides)
    path = ptq.export(result, tmp_path / "out", format=format)
    found = load_file(path / "model.safetensors")
    assert torch.equal(found["embed_out.weight"], expected["embed_out.weight"]) and "lm_head.weight" not in found
    if format == "dense":
        assert found.keys() == expected.keys()
    else:
        quantization = json.loads((path / "config.json").read_text())["quantization_config"]
        inside = "lm_head" if hasattr(model, "lm_head") else "embed_out"  # before version 5
        assert quantization["ignore"] == list(dict.fromkeys([inside, "embed_out"]))
    assert ptq.verify(path).is_right


def test_both_kinds_of_names_are_read_block_by_block(tmp_path: Path) -> None:
    model: Any = RENAMED()
    saved(model, tmp_path / "original")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "inside", save_original_format=False)
    for folder in ("original", "inside"):
        with torch.no_grad():
            assert torch.equal(Checkpoint(tmp_path / folder).copy()(token_ids()).logits, model(token_ids()).logits)


def test_layers_of_other_names_are_targets_under_both(
    loading: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace(".attention.", ".self_attention."): tensor for name, tensor in tensors.items()}

    monkeypatch.setattr(loading, "revert_weight_conversion", rename)
    result = ptq.compress(RENAMED(), token_ids(), symmetric=True, group_size=16, overrides=OVERRIDES)
    path = ptq.export(result, tmp_path / "out")
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    targets = {name for group in quantization["config_groups"].values() for name in group["targets"]}
    assert {"gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.self_attention.dense"} <= targets
    assert "gpt_neox.layers.1.self_attention.dense.weight_packed" in load_file(path / "model.safetensors")


def test_tensors_that_are_one_in_checkpoints_are_refused(loading: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def concatenate(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        together = [tensor for name, tensor in tensors.items() if ".dense_" in name and name.endswith("bias")]
        rest = {name: tensor for name, tensor in tensors.items() if not (".dense_" in name and name.endswith("bias"))}
        return {**rest, **({"biases": torch.cat(together)} if together else {})}

    monkeypatch.setattr(loading, "revert_weight_conversion", concatenate)
    with pytest.raises(
        ValueError, match=r"type gpt_neox cannot be exported: in checkpoints gpt_neox\.layers\.0\.mlp\.dense_"
    ):
        check_saved(RENAMED(), packed=False)


def test_models_of_transformers_4_have_the_names_of_their_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from opt8bit.ptq.model.saved import as_saved

    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    tensors = RENAMED().state_dict()
    assert as_saved(RENAMED(), tensors).keys() == tensors.keys()


def test_packed_weights_that_transformers_would_not_find_are_refused_before_the_work(tmp_path: Path) -> None:
    import transformers

    experts = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8, "moe_layers": [1]}
    config = transformers.Llama4TextConfig(**{**GATED, **experts}, pad_token_id=0)
    model = transformers.Llama4ForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"type llama4_text have experts in one tensor, .* use format 'dense'"):
        ptq.compress(model, token_ids(), bits=4, symmetric=True, checkpoint_format="compressed-tensors")
    with pytest.raises(ValueError, match=r"a\.weight_v does not end with \.weight"):
        check_packed(RENAMED(), ["b.weight", "a.weight_v"])


def test_models_with_a_vision_tower_have_the_names_that_transformers_4_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from opt8bit.ptq.model.saved import as_saved

    model = torch.nn.Linear(1, 1)
    names = {"^language_model.model": "model.language_model", "^language_model.lm_head": "lm_head"}
    model._checkpoint_conversion_mapping = names  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    tensor = torch.zeros(1)
    tensors = {name: tensor for name in ("model.language_model.norm.weight", "lm_head.weight", "lm_heads.weight")}
    expected = ["language_model.model.norm.weight", "language_model.lm_head.weight", "lm_heads.weight"]
    assert list(as_saved(model, tensors)) == expected
