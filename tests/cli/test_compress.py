"""``opt8bit compress`` and ``opt8bit evaluate`` on a small random model, and what they refuse before they begin."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALL, loaded
from torch import nn
from toys import MODELS

from opt8bit import ptq
from opt8bit.cli import progress
from opt8bit.cli.main import main
from opt8bit.ptq.model.source import InMemory
from opt8bit.ptq.plan import polished

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def compress(folder: Path, output: Path, *arguments: str) -> int:
    text = str(folder / "text.txt")
    return main(["compress", str(folder / "llama"), "--calibration", text, "--output", str(output), *SMALL, *arguments])


def test_three_arguments_write_a_model_that_loads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(folder, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "14 layers, 18,432 weights at 6.25 bits each, scales counted" in printed
    assert f"{tmp_path / 'out'} written in" in printed
    ids = torch.tensor([[int(word) for word in (folder / "text.txt").read_text().split()[:128]]]).view(8, 16)
    expected = ptq.compress(loaded(folder / "llama"), ids, group_size=16).compressed_model()
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "out")(ids).logits, expected(ids).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        (["--method", "rtn"], {"method": ptq.RTN()}),
        (["--method", "rtn", "--polish", "--range", "mse"], {"method": polished(ptq.RTN()), "range": "mse"}),
        (["--no-polish"], {"method": ptq.GPTQ()}),
        (["--no-act-order", "--no-polish"], {"method": ptq.GPTQ(act_order=False)}),
        (["--method", "quantease", "--symmetric"], {"method": polished(ptq.RTN()), "symmetric": True}),
        (["--symmetric-restricted"], {"symmetric": "restricted"}),
        (["--error-propagation", "0"], {"error_propagation": 0.0}),
        (["--bias-correction", "joint"], {"bias_correction": "joint"}),
        (["--bias-correction", "local", "--statistic", "median"], {"bias_correction": "local", "statistic": "median"}),
        (["--outliers", "0.02"], {"method": polished(ptq.OutlierQuantEase(0.02))}),
        (["--outliers", "0.02", "--no-polish"], {"method": ptq.OutlierQuantEase(0.02)}),
        (
            ["--method", "quantease", "--outliers", "0.1", "--outlier-structure", "column"],
            {"method": polished(ptq.OutlierQuantEase(0.1, "column", start=ptq.RTN()))},
        ),
    ],
    ids=str,
)
def test_options_are_those_of_the_library(
    arguments: list[str], recipe: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    assert compress(folder, tmp_path / "out", "--bits", "3", *arguments) == 0
    ids = torch.tensor([[int(word) for word in (folder / "text.txt").read_text().split()[:128]]]).view(8, 16)
    expected = ptq.compress(loaded(folder / "llama"), ids, bits=3, group_size=16, **recipe).compressed_model()
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "out")(ids).logits, expected(ids).logits)


def test_lines_tell_the_progress_where_there_is_no_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(folder, tmp_path / "out", "--bias-correction", "sequential", "--no-verify") == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if " of 14: " in line]
    report = json.loads((tmp_path / "out" / "opt8bit" / "report.json").read_text())
    expected = [f"layer {i} of 14: {layer['name']} error " for i, layer in enumerate(report["layers"], 1)]
    assert len(lines) == 14 and all(map(str.startswith, lines, expected))
    assert f"error {report['layers'][-1]['error_rounded']:.2%}, corrected " in lines[-1]
    assert " of 14: " not in printed.out


def test_a_bar_tells_it_on_a_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "has_bars", lambda: True)
    assert compress(folder, tmp_path / "out", "--no-verify") == 0
    shown = capsys.readouterr().err
    assert "14/14" in shown and " of 14: " not in shown


def test_what_the_library_logs_is_shown_and_only_then(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["compressing 14 layers of 2 blocks", "writing the checkpoint in the format dense"]
    assert compress(folder, tmp_path / "out", "--no-verify") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if " of 14: " not in line] == said
    result = ptq.compress(loaded(folder / "llama"), torch.arange(64).view(4, 16), group_size=16)
    ptq.export(result, tmp_path / "other", format="dense")
    assert not any(line in capsys.readouterr().err for line in said)


def test_a_seed_chooses_other_windows(folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", "0"), ("b", "7"), ("c", "7")):
        assert compress(folder, tmp_path / name, "--bits", "2", "--seed", seed) == 0
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in ((weights[0], weights[1]), weights[1:])]
    assert same == [False, True]


def test_biases_are_counted_and_named_where_there_is_no_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(folder, tmp_path / "out", "--bias-correction", "sequential") == 0
    printed = capsys.readouterr().out
    reason = "a constant in the keys shifts all scores alike, or harms under rotary embedding"
    assert "12 biases, " in printed and f"not corrected: 2 layers: {reason}" in printed
    mistral: Any = MODELS["mistral"]()
    mistral.save_pretrained(tmp_path / "mistral")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mistral" / file).write_bytes((folder / "llama" / file).read_bytes())
    text = str(folder / "text.txt")
    arguments = ["--calibration", text, "--output", str(tmp_path / "m"), *SMALL, "--bias-correction", "local"]
    assert main(["compress", str(tmp_path / "mistral"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "0 biases, 0 bytes more" in printed
    assert printed.count("not corrected: model.layers.1.") == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "1000"], "text.txt: 1000 samples of 16 tokens take 16,000, it has 600"),
        (["--group-size", "48"], "model.layers.0.self_attn.q_proj: group_size must be a positive divisor of the 32"),
        (["--act-order", "--method", "rtn"], "act_order, on or off, is GPTQ's: it has no meaning for rtn"),
        (["--method", "quantease", "--no-polish"], "without polish nothing is left of it"),
        (["--method", "rtn", "--error-propagation", "0.5"], "looks at no inputs: error_propagation must be 0"),
        (["--outliers", "1.5"], "outliers must be from 0 to 1, got 1.5"),
        (["--method", "rtn", "--outliers", "0.1"], "outliers are chosen by the inputs, which rtn does not look at"),
        (["--bias-correction", "local", "--error-propagation", "0.5"], "would undo what the asymmetric target does"),
        (["--sequence-length", "256", "--samples", "2"], "may be 128 tokens long, as many as the model has positions"),
        (["--outlier-structure", "column"], "outlier_structure says how outliers stand"),
        (["--statistic", "median"], "statistic='median' has no bias to serve"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_anything_is_done(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(folder, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert compress(folder, tmp_path / "out") == 2
    assert "exists: give the name of a folder that does not" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_that_cannot_be_made_is_said_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert compress(folder, tmp_path / "file" / "out") == 2
    captured = capsys.readouterr()
    assert "file" in captured.err and "error" not in captured.out
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", None])
def test_texts_are_checked(
    text: bytes | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "bad.txt").write_bytes(text)
    file = str(tmp_path / "bad.txt")
    for command in (
        ["compress", "--calibration", file, "--output", str(tmp_path / "out")],
        ["evaluate", "--text", file],
    ):
        assert main([command[0], str(folder / "llama"), *command[1:]]) == 2
        assert "bad.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_texts_are_looked_at_before_models_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("opt8bit.cli.evaluate.load", fail)
    monkeypatch.setattr("opt8bit.cli.compress.open_model", fail)
    (tmp_path / "short.txt").write_text("few words")
    for file, message in (("missing.txt", "cannot read"), ("short.txt", "the text has|it has")):
        for command, option in (("evaluate", "--text"), ("compress", "--calibration")):
            output = ["--output", str(tmp_path / "out")] if command == "compress" else []
            assert main([command, str(folder / "llama"), option, str(tmp_path / file), *output]) == 2
            assert re.search(f"{file}.*{message}|{message}.*{file}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (folder / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = math.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    text = str(folder / "text.txt")
    arguments = ["--calibration", text, "--output", str(tmp_path / "out"), *SMALL]
    assert main(["compress", str(tmp_path), *arguments]) == 2
    assert "model.layers.1.mlp.down_proj: a weight is not finite" in capsys.readouterr().err


def test_matrices_that_stay_as_they_are_are_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = MODELS["llama"]()
    for block in model.model.layers:
        block.mlp.experts = nn.Parameter(torch.zeros(2, 4, 8))
    monkeypatch.setattr("opt8bit.cli.compress.open_model", lambda *args, **options: InMemory(model))
    with pytest.warns(UserWarning, match="128 of the blocks' 18,560 weights are in no nn.Linear"):
        assert compress(folder, tmp_path / "out", "--no-verify") == 0


def test_no_pickle_is_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (folder / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    windows = ["--sequence-length", "16", "--samples", "5"]
    assert main(["evaluate", str(tmp_path), "--text", str(folder / "text.txt"), *windows]) == 2
    assert "cannot load" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "text.txt").read_bytes()
    printed = []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "text.txt").write_bytes(mark + text)
        arguments = ["--text", str(tmp_path / "text.txt"), "--sequence-length", "16", "--json"]
        assert main(["evaluate", str(folder / "llama"), *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_perplexity_that_is_not_finite_is_null_in_json(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt8bit.cli.evaluate.perplexity", lambda *args: math.inf)
    arguments = ["evaluate", str(folder / "llama"), "--text", str(folder / "text.txt"), "--sequence-length", "16"]
    assert main([*arguments, "--json"]) == 0
    assert '"perplexity": null' in capsys.readouterr().out
    assert main(arguments) == 0
    assert "perplexity inf of" in capsys.readouterr().out


def test_evaluate_prints_the_perplexity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder / "text.txt")
    arguments = ["evaluate", str(folder / "llama"), "--text", text, "--sequence-length", "16", "--samples", "5"]
    ids = torch.tensor([[int(word) for word in Path(text).read_text().split()[:80]]]).view(5, 16)
    expected = ptq.perplexity(loaded(folder / "llama"), ids)
    assert main(arguments) == 0
    assert f"perplexity {expected:.3f} of" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(expected)
    assert (found["samples"], found["sequence_length"], found["dtype"]) == (5, 16, "float32")
    assert main([*arguments[:-1], "500"]) == 2
    assert "500 samples of 16 tokens take 8,000, the text has 600" in capsys.readouterr().err
