"""What the command says before it compresses: of group sizes that one layer decides, and of biases that get lost."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import GATED

from opt8bit.cli.main import main
from opt8bit.ptq.model import memory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
# Three layers of four read the hidden states of 64, and one of each block something odd.
ODD: dict[str, Any] = {**GATED, "hidden_size": 64, "intermediate_size": 80}


@pytest.fixture
def odd(folder: Path, tmp_path: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ODD))
    model.save_pretrained(tmp_path / "odd")
    for file in folder.glob("llama/tokenizer*"):
        (tmp_path / "odd" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "odd"


def compress(model: Path, folder: Path, output: Path, *arguments: str) -> int:
    text = str(folder / "text.txt")
    small = ["--samples", "4", "--sequence-length", "16", "--method", "rtn", "--format", "dense", "--no-verify"]
    return main(["compress", str(model), "--calibration", text, "--output", str(output), *small, *arguments])


def test_a_layer_that_makes_all_groups_smaller_is_named_with_a_recipe_without_it(
    odd: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="all layers get groups of 16, because 64 does not divide") as caught:
        assert compress(odd, folder, tmp_path / "out") == 0
    (message,) = [str(each.message) for each in caught]
    assert "the inputs of model.layers.*.mlp.down_proj. To leave" in message
    (tmp_path / "recipe.json").write_text(message.partition("--recipe FILE with ")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compress(odd, folder, tmp_path / "mended", "--recipe", str(tmp_path / "recipe.json")) == 0
    used = [json.loads((tmp_path / name / "opt8bit" / "recipe.json").read_text()) for name in ("out", "mended")]
    assert [recipe["group_size"] for recipe in used] == [16, 64]


def test_nothing_is_said_of_groups_that_were_asked_for(odd: Path, folder: Path, tmp_path: Path) -> None:
    assert compress(odd, folder, tmp_path / "out", "--group-size", "0") == 0


def test_the_summary_names_biases_that_servers_do_not_use(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(folder / "llama", folder, tmp_path / "out", "--bias-correction", "sequential") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "6 layers: SGLang 0.5.23 loads this bias and does not use it" in printed
    report = json.loads((tmp_path / "out" / "opt8bit" / "report.json").read_text())
    noted = {row["name"] for row in report["layers"] if "SGLang" in row["note"]}
    assert noted == {f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")}


def test_a_model_of_which_no_block_fits_is_refused_and_nothing_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 50_000)
    assert compress(folder / "llama", folder, tmp_path / "out") == 2
    assert "does not hold the embeddings and the head" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
