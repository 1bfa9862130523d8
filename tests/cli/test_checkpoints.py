"""What ``opt8bit compress`` leaves: a checkpoint that is verified, a report, a recipe; and what a kill leaves of it."""

import csv
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import WINDOWS, loaded

from opt8bit import ptq
from opt8bit.cli.main import main
from opt8bit.ptq.calibration.outputs import OutputErrors
from opt8bit.ptq.inspect import inspect
from opt8bit.ptq.tasks.task import Quality
from opt8bit.ptq.verification import Verification

pytest.importorskip("compressed_tensors")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:not every server runs"),  # what is as small as here
]
SCHEMA = json.loads((Path(__file__).parent / "report.schema.json").read_text())


def compress(model: Path, text: Path, output: Path, *arguments: str) -> int:
    return main(["compress", str(model), "--calibration", str(text), "--output", str(output), *WINDOWS, *arguments])


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "out"
    assert compress(folder / "llama", folder / "text.txt", path, "--bias-correction", "sequential") == 0
    return path


def test_the_defaults_are_what_servers_load(written: Path) -> None:
    quantization = json.loads((written / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "pack-quantized"
    (group,) = quantization["config_groups"].values()
    assert group["weights"].items() >= {"num_bits": 4, "symmetric": True, "group_size": 16, "actorder": None}.items()
    assert quantization["ignore"] == ["lm_head"]


def test_files_are_for_whom_new_files_are(written: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    mode = (tmp_path / "new").stat().st_mode
    assert all(file.stat().st_mode == mode for file in written.rglob("*") if file.is_file())


def test_the_report_follows_its_schema_and_is_true(written: Path, folder: Path) -> None:
    report = json.loads((written / "opt8bit" / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    with (written / "opt8bit" / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer["name"] for layer in report["layers"]] and len(rows) == 14
    costs = [float(row["symmetry_cost"]) for row in rows]
    assert 0 < sum(costs) / len(costs) < 0.2
    assert all(-0.1 < cost < 0.3 for cost in costs)  # a layer may gain by the sign
    words = [int(word) for word in (folder / "text.txt").read_text().split()]
    held_out = torch.tensor(words[128 : 128 + 8 * 16]).view(8, 16)
    assert report["held_out"]["perplexity"] == pytest.approx(
        ptq.perplexity(loaded(folder / "llama"), held_out), rel=1e-4
    )
    found = ptq.perplexity(loaded(written), held_out)
    assert report["held_out"]["perplexity_compressed"] == pytest.approx(found, rel=1e-4)
    assert report["held_out"]["kl_divergence"] > 0


def test_its_page_is_what_opt8bit_report_writes(written: Path, tmp_path: Path) -> None:
    assert main(["report", str(written), "--output", str(tmp_path / "report.html")]) == 0
    assert (written / "opt8bit" / "report.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_the_recipe_that_is_written_repeats_the_run(written: Path, folder: Path, tmp_path: Path) -> None:
    recipe = written / "opt8bit" / "recipe.json"
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "a", "--recipe", str(recipe)) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "opt8bit" / "recipe.json").read_bytes() == recipe.read_bytes()


def test_recipes_have_options_for_single_layers_and_flags_go_first(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    overrides = [
        {"layers": "*.down_proj", "bits": 8, "group_size": 32},
        {"layers": "model.layers.0.*", "skip": True},
        {"layers": "*.v_proj", "method": "rtn"},
    ]
    recipe.write_text(json.dumps({"bits": 2, "symmetric": True, "polish": False, "overrides": overrides}))
    options = ["--recipe", str(recipe), "--bits", "4"]
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out", *options) == 0
    report = json.loads((tmp_path / "out" / "opt8bit" / "report.json").read_text())
    layers = {layer["name"]: layer["bits_per_weight"] for layer in report["layers"]}
    assert len(layers) == 8 and layers["model.layers.1.mlp.down_proj"] == 9 and set(layers.values()) == {6, 9}
    assert "model.layers.0.self_attn.v_proj" in layers  # the last pattern that fits is the one
    assert report["recipe"]["overrides"] == overrides and report["recipe"]["bits"] == 4


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{", "cannot read the recipe"),
        ("[]", "a recipe is an object"),
        ('{"widths": 3}', "'widths' is none of method, bits"),
        ('{"output": "x"}', "'output' is none of"),
        ('{"sym": true}', "'sym' is none of .*, samples, .*, overrides; here it is symmetric"),
        ("[3]", r"recipe\.json: a recipe is an object with names of options, got \[3\]"),
        ('{"overrides": {}}', "overrides must be a list"),
        ('{"overrides": [{"bits": 3}]}', "a pattern of names as 'layers'"),
        ('{"overrides": [{"layers": "*", "seed": 3}]}', "an override: 'seed' is none of method, .*, skip"),
        ('{"overrides": [{"layers": "*", "skip": 1.5}]}', "skip of an override must be true or false, got 1.5"),
        (
            '{"overrides": [{"layers": "*", "symmetric": "false"}]}',
            "symmetric of an override must be true or false or 'restricted'",
        ),
        ('{"overrides": [{"layers": "*", "outliers": "0.1"}]}', "outliers of an override must be a number, got '0.1'"),
        ('{"overrides": [{"layers": "*", "method": "gptqq"}]}', "must be one of rtn, gptq, quantease, got 'gptqq'"),
        (
            '{"overrides": [{"layers": "*_proj", "act_order": true, "method": "rtn"}]}',
            r"overrides\['\*_proj'\]: act_order, on or off",
        ),
        ('{"symmetric": "true"}', "symmetric must be true or false or 'restricted', got 'true'"),
        ('{"bits": true}', r"recipe\.json: bits must be a whole number, got True"),
        ('{"bits": null}', "bits must be a whole number, got None"),
        ('{"samples": 8.0}', r"samples must be a whole number, got 8\.0"),
        ('{"error_propagation": "0.5"}', "error_propagation must be a number, got '0.5'"),
        ('{"format": "awq"}', "format must be one of compressed-tensors, gptq, mlx, gguf, dense, got 'awq'"),
        ('{"error_propagation": -1e-05}', "error_propagation must be from 0 to 1, got -1e-05"),
        ('{"overrides": [{"layers": "*.o_proj"}]}', r"has some of method, .*, got \{'layers': '\*\.o_proj'\}"),
        (
            '{"overrides": [{"layers": "*.o_proj", "skip": true, "bits": 3}]}',
            r"that skips its layers has no other options, got \{'layers': '\*\.o_proj'",
        ),
        (
            '{"overrides": [{"layers": "*.gate", "bits": 3}]}',
            r"overrides\['\*.gate'\] fits no layer; there is model.layers.0",
        ),
        ('{"overrides": [{"layers": "*", "skip": true}]}', "overrides leave every layer as it is"),
        ('{"overrides": [{"layers": "*.v_proj", "bits": 9}]}', "bits must be 2 to 8, got 9"),
    ],
)
def test_recipes_are_checked(
    recipe: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipe.json").write_text(recipe)
    options = ["--recipe", str(tmp_path / "recipe.json")]
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out", *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_two_names_of_one_option_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text('{"correct": "local", "bias_correction": "none"}')
    flags = ["--correct", "local", "--bias-correction", "none"]
    for options in (["--recipe", str(tmp_path / "recipe.json")], flags):
        with pytest.warns(DeprecationWarning, match="correct is called bias_correction now"):
            assert compress(folder / "llama", folder / "text.txt", tmp_path / "out", *options) == 2
        assert "correct and bias_correction are one option: give bias_correction only" in capsys.readouterr().err


def test_of_overrides_with_one_pattern_the_last_is_meant(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    overrides = [
        {"layers": "*.v_proj", "skip": True},
        {"layers": "*", "bits": 2},
        {"layers": "*.v_proj", "method": "rtn"},
    ]
    recipe.write_text(json.dumps({"act_order": False, "symmetric": True, "overrides": overrides}))
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out", "--recipe", str(recipe)) == 0
    report = json.loads((tmp_path / "out" / "opt8bit" / "report.json").read_text())
    bits = {layer["name"].rpartition(".")[2]: layer["bits_per_weight"] for layer in report["layers"]}
    assert bits["v_proj"] == 6 and bits["q_proj"] == 4


def test_inspect_tells_several_widths_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.json"
    overrides = [{"layers": "*.mlp.*", "bits": 8, "group_size": 0}, {"layers": "*.o_proj", "skip": True}]
    recipe.write_text(json.dumps({"overrides": overrides}))
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out", "--recipe", str(recipe)) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"q_proj +32 × 32  4-bit signed", printed) and re.search(
        r"down_proj +32 × 64  8-bit signed", printed
    )
    for config in ("[]", '{"quantization_config": "x"}', '{"quantization_config": {}}'):
        (tmp_path / "out" / "config.json").write_text(config)
        assert main(["inspect", str(tmp_path / "out")]) == 2
        assert "config.json is missing or damaged" in capsys.readouterr().err
    (tmp_path / "out" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert (
        "of the format awq: only compressed-tensors, gptq, mlx, gguf, dense can be inspected" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        (["--no-symmetric"], "asymmetric"),
        (["--symmetric-restricted"], "symmetric"),
        (["--symmetric"], "signed"),
        (["--format", "gptq"], "signed"),
        (["--format", "gptq", "--symmetric-restricted"], "symmetric"),
    ],
    ids=" ".join,
)
def test_inspect_says_which_grid_a_file_has(
    options: list[str], grid: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out", *options) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f" 4-bit {grid} " in capsys.readouterr().out
    assert {layer.grid for layer in inspect(tmp_path / "out").layers.values()} == {grid}


def test_verify_says_what_is_wrong(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(written)]) == 0
    assert "loads as what was made: logits differ by" in capsys.readouterr().out
    damaged = tmp_path / "damaged"
    shutil.copytree(written, damaged)
    weights = load_file(damaged / "model.safetensors")

    def save(**changes: Any) -> None:
        changed = {name: value for name, value in {**weights, **changes}.items() if value is not None}
        save_file(changed, damaged / "model.safetensors", {"format": "pt"})

    scale = "model.layers.1.mlp.down_proj.weight_scale"
    save(**{scale: weights[scale] * 1.2})
    assert main(["verify", str(damaged)]) == 2
    assert "does not load as what was made" in capsys.readouterr().err
    save(**{"model.layers.0.self_attn.q_norm.bias": torch.zeros(3)})
    assert main(["verify", str(damaged)]) == 2
    assert "dropped on loading: model.layers.0.self_attn.q_norm.bias" in capsys.readouterr().err
    save(**{"model.layers.0.mlp.up_proj.bias": None})
    assert main(["verify", str(damaged)]) == 2
    assert "missing: model.layers.0.mlp.up_proj.bias" in capsys.readouterr().err
    (damaged / "opt8bit" / "probe.safetensors").write_bytes(b"x")
    assert main(["verify", str(damaged)]) == 2
    assert "probe.safetensors is missing or damaged" in capsys.readouterr().err
    shutil.rmtree(damaged / "opt8bit")
    assert main(["verify", str(damaged)]) == 2
    assert "only what opt8bit compress or correct has written can be verified" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_load_right_is_not_left(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ptq, "verify", lambda *a, **b: Verification(0.5, 1e-3, ["x.bias"], []))
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out") == 2
    assert "dropped on loading: x.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_counts_everything(written: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(written)]) == 0
    printed = capsys.readouterr().out
    shape_bits = 8 * 16 / (32 * 32)  # weight_shape, of a small layer
    assert f"32 × 32  4-bit signed      {4 + 32 / 16 + shape_bits:6.3f} bits  bias attention_bias" in printed
    assert "14 packed layers, 18,432 weights at" in printed
    size = (written / "model.safetensors").stat().st_size / 1e6
    assert f"compressed-tensors: {size:,.1f} MB" in printed
    assert main(["inspect", str(folder / "llama")]) == 0
    printed = capsys.readouterr().out
    assert "dense: " in printed and "32 × 32  dense             32.000 bits\n" in printed
    dense, packed = inspect(folder / "llama"), inspect(written)
    biases = sum(layer.shape[0] for layer in packed.layers.values() if layer.bias)
    assert 2 * dense.original_bytes == dense.stored_bytes  # all in float32
    assert packed.original_bytes == dense.original_bytes + 2 * biases
    assert main(["inspect", str(folder)]) == 2
    assert "config.json is missing or damaged" in capsys.readouterr().err


def test_inspect_names_what_a_packed_weight_lacks(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(written / "config.json", tmp_path)
    weights = load_file(written / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight_shape"]
    save_file(weights, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 2
    expected = r"model\.safetensors: .*\.down_proj has weight_packed, but no weight_shape"
    assert re.search(expected, capsys.readouterr().err)


def test_numbers_that_are_not_finite_are_null_in_the_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = Quality(112, math.inf, math.nan, math.nan)
    monkeypatch.setattr("opt8bit.ptq.tasks.causal_lm.CausalLM.quality", lambda *args, **options: quality)
    relative = OutputErrors.relative
    monkeypatch.setattr(OutputErrors, "relative", lambda self, name: (math.inf, relative(self, name)[1]))
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out") == 0
    text = (tmp_path / "out" / "opt8bit" / "report.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.validate(report, SCHEMA)
    assert report["held_out"] == {**dict.fromkeys(quality._fields), "tokens": 112}
    assert report["layers"][0]["error_rounded"] is None and report["layers"][0]["error_corrected"] > 0


def test_a_tokenizer_that_is_missing_is_said_first(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder / "llama", tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    assert compress(tmp_path / "model", folder / "text.txt", tmp_path / "out") == 2
    assert "cannot load 'the tokenizer of" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def command(model: Path, text: Path, output: Path, *arguments: str) -> list[str]:
    words = ["compress", str(model), "--calibration", str(text), "--output", str(output), *WINDOWS, *arguments]
    code = f"import sys; from opt8bit.cli.main import main; sys.exit(main({words!r}))"
    return [sys.executable, "-W", "ignore", "-c", code]


def changes(folder: Path) -> dict[str, int]:
    """The files below a folder, and their sizes."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # gone since
            found[str(path)] = path.stat().st_size
    return found


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(written: Path, folder: Path, tmp_path: Path) -> None:
    moments, kills, out = random.Random(0), 0, tmp_path / "out"
    options = command(folder / "llama", folder / "text.txt", out, "--bias-correction", "sequential", "--resume")
    while True:
        process = subprocess.Popen(options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = changes(tmp_path)
        for _ in range(moments.randint(2, 6)):  # so many new names or sizes of files later
            while process.poll() is None and changes(tmp_path) == before:
                time.sleep(0.001)
            before = changes(tmp_path)
        if process.poll() is not None or kills == 6:
            process.wait()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if out.exists():  # at the very end
            break
    assert out.exists()
    assert kills
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for file in written.rglob("*"):
        # With seconds, or with the folder's name.
        if file.is_file() and file.name not in ("report.json", "layers.csv", "run.json", "report.html"):
            assert (out / file.relative_to(written)).read_bytes() == file.read_bytes(), file


def test_an_unfinished_run_is_not_overwritten(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "work").mkdir(parents=True)
    (partial / "work" / "block-00000.safetensors").write_bytes(b"hours of work")
    assert compress(folder / "llama", folder / "text.txt", tmp_path / "out") == 2
    assert f"{partial} is an unfinished run's: resume it, or delete that folder" in capsys.readouterr().err
    assert (partial / "work" / "block-00000.safetensors").read_bytes() == b"hours of work"


@pytest.mark.skipif(sys.platform == "win32", reason="locks are those of POSIX")
def test_two_runs_into_one_folder_are_one_too_many(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import fcntl

    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for resume in ([], ["--resume"]):
            assert compress(folder / "llama", folder / "text.txt", tmp_path / "out", *resume) == 2
            assert f"another run is writing {tmp_path / '.out.partial'}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are those of POSIX")
@pytest.mark.slow
def test_a_full_disk_leaves_what_is_finished(folder: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the first block fits, the checkpoint does not."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    few = ["--samples", "2", "--held-out", "0"]
    options = command(folder / "llama", folder / "text.txt", tmp_path / "out", *few)
    stopped = subprocess.run(options, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2 and "opt8bit compress: " in stopped.stderr and "Traceback" not in stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    whole = command(folder / "llama", folder / "text.txt", tmp_path / "out", *few, "--resume")
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def unshared(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a shell's script in a folder; what it mounts is seen by itself alone, and gone at its end."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


FULL_DISK = """
mount -t tmpfs -o size={size} tmpfs disk && echo "somebody's" > disk/other || exit
{command} 2> stopped.err
echo $? > stopped.status
cp -r disk stopped
mount -o remount,size=4m disk && {command_resumed} 2> resumed.err
echo $? > resumed.status
cp -r disk resumed
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="only Linux has file systems for one process alone")
@pytest.mark.parametrize(
    ("size", "long_tokenizer", "blocks", "message"),
    [
        ("16k", False, 0, "cannot write .*/work/block-00000.*No space left on device"),
        ("48k", False, 1, "cannot write .*/work/block-00001.*No space left on device"),
        ("120k", False, 2, "cannot write .*/0.(partial|data): .*No space left on device"),  # the weights
        ("300k", True, 2, "cannot copy tokenizer.json from .*: No space left on device"),
    ],
    ids=["first block", "second block", "weights", "tokenizer"],
)
def test_a_small_file_system_fills_up_and_grows(
    size: str, long_tokenizer: bool, blocks: int, message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    tried = unshared("mount -t tmpfs tmpfs disk", tmp_path)
    if tried.returncode:
        pytest.skip(f"file systems cannot be mounted here: {tried.stderr.strip()}")
    model = tmp_path / "model"
    shutil.copytree(folder / "llama", model)
    if long_tokenizer:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {f"never said {number}": number for number in range(96, 20_000)}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    out, few = tmp_path / "disk" / "out", ["--samples", "2", "--held-out", "0", "--no-verify"]
    commands = [shlex.join(command(model, folder / "text.txt", out, *few, *last)) for last in ([], ["--resume"])]
    unshared(FULL_DISK.format(size=size, command=commands[0], command_resumed=commands[1]), tmp_path)
    stopped, resumed = tmp_path / "stopped", tmp_path / "resumed"
    error = (tmp_path / "stopped.err").read_text()
    assert (tmp_path / "stopped.status").read_text() == "2\n", error
    assert re.search(f"opt8bit compress: .*{message}", error) and "Traceback" not in error
    assert {path.name for path in stopped.iterdir()} == {"other", *([".out.partial"] if blocks else [])}
    assert len(list(stopped.glob(".out.partial/work/block-*.safetensors"))) == blocks
    assert (tmp_path / "resumed.status").read_text() == "0\n", (tmp_path / "resumed.err").read_text()
    assert {path.name for path in resumed.iterdir()} == {"other", "out"}
    assert (stopped / "other").read_text() == (resumed / "other").read_text() == "somebody's\n"
    assert (resumed / "out" / "model.safetensors").is_file() and not (resumed / "out" / "work").exists()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_torchrun_shares_the_work(written: Path, folder: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "opt8bit"]
    words = ["compress", str(folder / "llama"), "--calibration", str(folder / "text.txt"), *WINDOWS, "--samples", "16"]
    done = subprocess.run(
        [*run, *words, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written in") == 1 and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written.iterdir()}
    again = subprocess.run(
        [*run, *words, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert again.returncode and "out exists: give the name of a folder that does not" in again.stderr
