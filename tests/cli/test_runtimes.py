"""``opt8bit compress --for RUNTIME``: what is written, and what is refused with nothing written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import GATED

from opt8bit import ptq
from opt8bit.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WIDE: dict[str, Any] = {**GATED, "hidden_size": 64, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def wide(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose shapes all runtimes have kernels for."""
    import transformers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide")
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE))
    model.save_pretrained(path)
    for file in folder.glob("llama/tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def compress(model: Path, folder: Path, output: Path, *arguments: str) -> int:
    text = str(folder / "text.txt")
    small = ["--samples", "4", "--sequence-length", "16", "--method", "rtn"]
    return main(["compress", str(model), "--calibration", text, "--output", str(output), *small, *arguments])


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--for", "vllm", "--bits", "3"], "3-bit asymmetric"),
        (["--for", "sglang", "--bits", "8"], "8-bit signed"),
        (["--for", "compressed-tensors-0.17", "--bits", "3"], "3-bit asymmetric"),
        (["--for", "vllm", "--format", "gptq"], "4-bit signed"),
        (["--for", "mlx", "--bits", "3"], "3-bit signed"),
    ],
    ids=str,
)
def test_what_is_written_is_for_the_runtime(
    arguments: list[str], printed: str, wide: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(wide, folder, tmp_path / "out", *arguments, "--no-verify") == 0
    recipe = tmp_path / "out" / "opt8bit" / "recipe.json"
    assert json.loads(recipe.read_text())["runtime"] == arguments[1]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(printed) == 14
    assert compress(wide, folder, tmp_path / "again", "--recipe", str(recipe), "--no-verify") == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second


def test_words_that_the_installed_package_misreads_are_verified_all_the_same(
    wide: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.18")
    assert compress(wide, folder, tmp_path / "out", "--for", "compressed-tensors-0.17", "--bits", "3") == 0
    printed = capsys.readouterr().out
    assert "loaded back: logits differ by" in printed and "unpacked by opt8bit: transformers" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "sglang", "--bits", "3"], "SGLang 0.5.23 does not run 3 bits, symmetric, groups of 64: use 4 or 8"),
        (["--for", "vllm-cpu", "--bits", "8"], "vLLM 0.33.0 on CPUs does not run 8 bits"),
        (["--for", "llama.cpp"], "gguf holds tokenizers of byte-level BPE and SentencePiece, got WordLevel after"),
        (["--for", "sglang", "--format", "gptq"], "reads the formats compressed-tensors and dense, got 'gptq'"),
    ],
    ids=str,
)
def test_what_the_runtime_does_not_run_is_refused(
    arguments: list[str],
    message: str,
    wide: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys.modules[ptq.compress.__module__], "run", lambda *args, **options: pytest.fail("the work has begun")
    )
    assert compress(wide, folder, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_recipes_runtime_is_checked(
    wide: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"runtime": "vlm"}')
    assert compress(wide, folder, tmp_path / "out", "--recipe", str(recipe)) == 2
    assert "runtime must be one of vllm, vllm-cpu, sglang, transformers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compress(wide, folder, tmp_path / "out", "--for", "vlm")
    assert "argument --for: invalid choice: 'vlm'" in capsys.readouterr().err
