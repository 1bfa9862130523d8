import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from opt8bit.cli import memory
from opt8bit.cli.main import main
from opt8bit.optim import memory_report
from opt8bit.optim.memory import readable


def fail(*_: Any, **__: Any) -> Any:
    raise OSError("no such model\nand much advice")


def transformers_stub(
    from_pretrained: Callable[..., Any] = lambda *_, **__: object(),
    from_config: Callable[..., nn.Module] = lambda *_, **__: nn.Linear(300, 40, dtype=torch.bfloat16),
) -> SimpleNamespace:
    """What this package uses of transformers."""
    return SimpleNamespace(
        AutoConfig=SimpleNamespace(from_pretrained=from_pretrained),
        AutoModel=SimpleNamespace(from_config=from_config),
        AutoModelForCausalLM=SimpleNamespace(from_config=fail),
        MODEL_FOR_CAUSAL_LM_MAPPING={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_options_and_dtype_are_honoured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", transformers_stub())
    assert main(["memory", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed == (
        f"Linear of {folder}: 12,040 elements, bfloat16\n\n{memory_report(nn.Linear(300, 40, dtype=torch.bfloat16))}\n"
    )
    arguments = ["--dtype", "float32", "--block-size", "64", "--min-8bit-size", "30"]
    assert main(["memory", str(folder), *arguments]) == 0
    expected = memory_report(nn.Linear(300, 40), block_size=64, min_8bit_size=30)
    printed = capsys.readouterr().out
    assert "12,040 elements, float32" in printed and str(expected) in printed


def test_ranks_share_the_parameters(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(llama), "--ranks", "4"]) == 0
    printed = capsys.readouterr().out
    network = memory.build(str(llama))
    report = memory_report(network, ranks=4)
    assert str(report) in printed and "on each of 4 ranks" in printed
    weights = sum(param.numel() for param in network.parameters()) * 4
    assert 4 * report.rows[0].weight_bytes == weights  # whose rows are all multiples of four
    assert f"up to {readable(weights * 3 / 2)} of weights" in printed
    assert f"{readable(weights * 3 / 4)} of gradients" in printed
    with pytest.raises(ValueError, match="ranks must be a positive integer, got 0"):
        memory_report(network, ranks=0)


def test_a_language_model_is_built_from_its_configuration(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(llama)]) == 0
    printed = capsys.readouterr().out
    network = memory.build(str(llama))
    assert type(network).__name__ == "LlamaForCausalLM"
    assert all(param.is_meta for param in network.parameters())
    assert str(memory_report(network)) in printed


def test_the_dtype_is_the_configurations(llama: Path) -> None:
    text = (llama / "config.json").read_text()
    (llama / "config.json").write_text(text.replace("{", '{"dtype": "bfloat16", "torch_dtype": "bfloat16",', 1))
    assert "elements, bfloat16" in memory.report(str(llama), "config", 256, 4096)
    assert "elements, float16" in memory.report(str(llama), "float16", 256, 4096)


def test_other_architectures_are_built_as_well(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ViTConfig(**sizes).save_pretrained(tmp_path)
    assert "ViTModel" in memory.report(str(tmp_path), "config", 256, 4096)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "there is no folder '/no/such/folder'"),
        ("./missing", "there is no folder './missing'"),
        ("one/two/three", "there is no folder 'one/two/three'"),
        ("", "'' has no config.json"),
        (str(Path(__file__).parent), "has no config.json"),
        (__file__, "is a file; MODEL must be a folder with a config.json"),
    ],
)
def test_paths_are_checked_first(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", model]) == 2
    assert message in capsys.readouterr().err


STUBS = {
    "no transformers": (None, "transformers is missing: pip install 'opt8bit[memory]'"),
    "no configuration": (transformers_stub(fail), "no such model\n"),
    "no model": (transformers_stub(from_config=fail), "cannot build the model of"),
}


@pytest.mark.parametrize("stub", STUBS)
def test_what_fails_is_said(
    stub: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, message = STUBS[stub]
    monkeypatch.setitem(sys.modules, "transformers", module)
    assert main(["memory", str(folder)]) == 2
    said = capsys.readouterr().err
    assert message in said and "advice" not in said


def test_a_model_that_is_nowhere_may_be_a_folder_or_an_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", transformers_stub(fail))
    assert main(["memory", "owner/missing"]) == 2
    said = capsys.readouterr().err
    assert "there is no folder 'owner/missing', and as an id of the hub: no such model" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "8"], "block_size must be an integer from 16 to 16384, got 8"),
        (["--min-8bit-size", "-1"], "min_8bit_size must be a non-negative integer, got -1"),
    ],
)
def test_options_out_of_range_are_refused(
    arguments: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", transformers_stub())
    assert main(["memory", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_dtype_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", str(folder), "--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err
