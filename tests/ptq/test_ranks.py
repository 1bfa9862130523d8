"""Two processes that share the calibration come to what one comes to, up to the rounding of sums."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.tasks.task import Quality

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

CODE = """
import sys, warnings, weakref
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from safetensors.torch import save_file
from toys import MODELS, token_ids
from opt8bit import ptq
rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
try:
    for layers in options.pop("end_after", ()):
        seen = []
        def see(report, count):
            seen.append(report)
            if len(seen) == layers[rank]:
                raise KeyboardInterrupt
        try:
            ptq.compress(MODELS["llama"](), token_ids(), batch_size=2, held_out=token_ids(3), see=see, **options)
        except KeyboardInterrupt:
            pass
    result = ptq.compress(MODELS["llama"](), token_ids(), batch_size=2, held_out=token_ids(3), **options)
    tensors = {{name: (change if isinstance(change, torch.Tensor) else change.dequantize()).contiguous()
               for name, change in result.changes.items()}}
    save_file(tensors, folder / f"{{rank}}.safetensors")
    (folder / f"{{rank}}.txt").write_text(repr((result.quality, [(r.name, r.error_corrected) for r in result.report])))
except ValueError as error:
    (folder / f"{{rank}}.txt").write_text(str(error))
group = weakref.ref(torch.distributed.group.WORLD)
torch.distributed.destroy_process_group()
assert group() is None  # a process that ends with the group's threads still at work may be aborted
"""


def run(folder: Path, **options: Any) -> None:
    code = CODE.format(tests=str(Path(__file__).parent))
    (folder / "store").unlink(missing_ok=True)
    words = [[sys.executable, "-c", code, str(rank), str(folder), repr(options)] for rank in range(2)]
    processes = [subprocess.Popen(each) for each in words]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("correct", "weighting"),
    [
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("none", "tokens"), ("local", "none"))),
        ("joint", "none"),
    ],
)
def test_two_do_what_one_does(correct: str, weighting: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "bits": 4,
        "group_size": 16,
        "bias_correction": correct,
        "loss_weighting": weighting,
    }
    run(tmp_path, **options)
    expected = ptq.compress(MODELS["llama"](), token_ids(), batch_size=2, held_out=token_ids(3), **options)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[key], value) for key, value in second.items())
    assert first.keys() == expected.changes.keys()
    weights = {name: change.dequantize() for name, change in expected.changes.items() if "weight" in name}  # type: ignore[union-attr]
    # Weights of tokens are no whole numbers: their sum, and so a scale, may differ in its last bit.
    close = 1e-6 if weighting == "tokens" else 0.0
    same = sum(int(first[name].isclose(weight, rtol=close, atol=0).sum()) for name, weight in weights.items())
    assert same / sum(weight.numel() for weight in weights.values()) > 0.99
    for name, bias in expected.changes.items():
        if isinstance(bias, torch.Tensor):
            assert float((first[name] - bias).norm()) < 0.1 * float(bias.norm())
    quality, errors = eval((tmp_path / "0.txt").read_text(), {"Quality": Quality})
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
    assert expected.quality is not None and quality.tokens == expected.quality.tokens
    assert quality.perplexity == pytest.approx(expected.quality.perplexity, rel=1e-5)
    assert quality.perplexity_compressed == pytest.approx(expected.quality.perplexity_compressed, rel=1e-2)
    for row, (name, error) in zip(expected.report, errors, strict=True):
        assert row.name == name and error == pytest.approx(row.error_corrected, rel=0.1)


@pytest.mark.slow
def test_ended_runs_of_two_go_on(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", bits=4, group_size=16)
    run(tmp_path, bits=4, group_size=16, work=str(tmp_path / "work"), end_after=[(7, 7), (8, 8)])
    whole, found = (load_file(folder / "0.safetensors") for folder in (tmp_path / "whole", tmp_path))
    assert whole.keys() == found.keys() and all(torch.equal(whole[key], value) for key, value in found.items())
    assert len(list((tmp_path / "work").glob("streams-*"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bias_correction": "local", "statistic": "median"},
            "several processes share means alone, got statistic='median'",
        ),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_shared_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    run(tmp_path, group_size=16, **options)
    assert {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)} == {message}
