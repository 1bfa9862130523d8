"""Verification: what plain ``from_pretrained`` loads right is right, however its blocks can be kept."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from toys import GATED, MODELS, VOCABULARY, _make, token_ids

from opt8bit import ptq

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def ctrl() -> nn.Module:
    import transformers

    return transformers.CTRLLMHeadModel(transformers.CTRLConfig(**SMALL, dff=64)).eval()


NOT_ON_DISK: dict[str, Callable[[], nn.Module]] = {
    "gpt_bigcode": _make("GPTBigCode", **SMALL),
    "ctrl": ctrl,
    "recurrent_gemma": _make(
        "RecurrentGemma", **{**GATED, "num_hidden_layers": 3}, attention_window_size=8, head_dim=8, lru_width=32
    ),
}


@pytest.mark.filterwarnings("ignore:.*weights are in no nn.Linear:UserWarning")
@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
@pytest.mark.parametrize("name", NOT_ON_DISK)
def test_what_cannot_be_kept_on_disk_is_loaded_whole(name: str, format: str, tmp_path: Path) -> None:
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    result = ptq.compress(NOT_ON_DISK[name](), token_ids(), group_size=16, symmetric=True)
    path = ptq.export(result, tmp_path / "out", format=format)
    assert ptq.verify(path, in_parts=True).is_right and ptq.verify(path).is_right


@pytest.fixture
def path(tmp_path: Path) -> Path:
    result = ptq.compress(MODELS["llama"](), token_ids(), group_size=16)
    return ptq.export(result, tmp_path / "out", format="dense")


def test_what_cannot_be_run_from_disk_is_loaded_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    from_disk: list[bool] = []

    def cannot_unpack(*args: Any) -> None:  # as transformers 4.57 and compressed-tensors 0.20 do on the first call
        raise ValueError("Expected torch.int32 but got torch.float32, Aborting unpack.")

    def from_pretrained(*args: Any, **options: Any) -> Any:
        model, info = load(*args, **options)
        from_disk.append("device_map" in options)
        if from_disk[-1]:
            model.register_forward_pre_hook(cannot_unpack)
        return model, info

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert ptq.verify(path, scratch=path.parent, in_parts=True).is_right
    assert from_disk == [True, False] and [entry.name for entry in path.parent.iterdir()] == ["out"]


def test_what_cannot_be_loaded_whole_is_wrong(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
        ptq.verify(path)


def test_models_are_loaded_as_users_do_unless_they_take_too_much(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ptq.verify(path).in_parts
    monkeypatch.setattr(sys.modules[ptq.verify.__module__], "machine_memory", lambda: 1000)
    verification = ptq.verify(path)
    assert verification.in_parts and verification.is_right and "run from disk, block by block" in str(verification)
