"""Checkpoints: what was compressed is what is loaded, and nothing half-written is left."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.export.folder import new_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("correct", ["none", "sequential"])
def test_dense_loads_as_the_compressed_model(name: str, correct: str, tmp_path: Path) -> None:
    result = ptq.compress(MODELS[name](), token_ids(), bits=3, group_size=16, correct=correct)
    path = ptq.export(result, tmp_path / "out", format="dense")
    loaded, info = load(path)
    assert not any(info.values())
    with torch.no_grad():
        expected = result.compressed_model()(token_ids()).logits
        assert torch.equal(loaded.eval()(token_ids()).logits, expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_switches_are_on_only_for_biases_that_are_there(tmp_path: Path) -> None:
    for correct, on in (("none", False), ("joint", True)):
        result = ptq.compress(MODELS["llama"](), token_ids(), bits=3, group_size=16, correct=correct)
        config = json.loads((ptq.export(result, tmp_path / correct) / "config.json").read_text())
        assert config["attention_bias"] is config["mlp_bias"] is on


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    result = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="out exists: give the name of a folder that does not"):
        ptq.export(result, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    result = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").is_file() and not (tmp_path / "out").exists()
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        ptq.export(result, tmp_path / "out", tokenizer=Tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_folders_made_on_the_way_go_with_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "c"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_formats_are_checked(tmp_path: Path) -> None:
    result = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16)
    with pytest.raises(ValueError, match="format must be one of dense, got 'gguf'"):
        ptq.export(result, tmp_path / "out", format="gguf")
    position = ptq.compress(MODELS["gpt2"](), token_ids(), group_size=16, correct="local", statistic="position")
    with pytest.raises(ValueError, match="no checkpoint can hold a bias for each position"):
        ptq.export(position, tmp_path / "out")
    assert not list(tmp_path.iterdir())
