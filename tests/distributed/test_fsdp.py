"""FSDP2 and distributed checkpoints: whatever the number of processes, the same bits."""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

import training
from processes import run
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from training import CASES

from opt8bit.optim import check_distributed_checkpoint

dcp: Any = importlib.import_module("torch.distributed.checkpoint")
USUAL = ("plain", 1, 2)  # processes that train, or one that knows nothing of shards
MANY = pytest.param(4, marks=pytest.mark.slow)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's word on one process alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process makes of plain tensors."""
    return training.train(folder, "plain")


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Callable[[int], dict[str, dict[str, Any]]]:
    """What so many processes make of shards."""

    @functools.cache
    def trained(ranks: int) -> dict[str, dict[str, Any]]:
        run("training.py", ranks, "train", folder)
        return torch.load(folder / f"train-{ranks}.pt")

    return trained


@pytest.fixture(scope="module")
def resumed(folder: Path, plain: object, sharded: Any) -> Callable[[Any, Any], dict[str, dict[str, Any]]]:
    """By who wrote the checkpoint and who went on from it."""

    @functools.cache
    def gone_on(writers: tuple[Any, ...], reader: Any) -> dict[Any, dict[str, dict[str, Any]]]:
        for writer in writers:
            if writer != "plain":
                sharded(writer)
        if reader == "plain":
            return {writer: training.resume(folder, writer) for writer in writers}
        run("training.py", reader, "resume", folder, *writers)
        return torch.load(folder / f"resume-{reader}.pt")

    return lambda writer, reader: gone_on(USUAL if writer in USUAL else (writer,), reader)[writer]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, MANY])
def test_the_same_bits_on_any_number_of_processes(ranks: int, case: str, plain: Any, sharded: Any) -> None:
    assert_same(sharded(ranks)[case], plain[case])


def test_what_is_in_8_bits_is_decided_by_the_whole(plain: Any) -> None:
    coded = {name for name in training.SHAPES if f"{name}.exp_avg_codes" in plain["AdamW"]}
    assert coded == {"square", "uneven", "few", "image"}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reader", [*USUAL, MANY])
@pytest.mark.parametrize("writer", [*USUAL, MANY])
def test_a_checkpoint_of_any_number_of_processes_goes_on_with_any_other(
    writer: Any, reader: Any, case: str, plain: Any, resumed: Any
) -> None:
    assert_same(resumed(writer, reader)[case], plain[case])


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_earlier_checkpoint(folder: Path, plain: Any) -> None:
    killed = run("training.py", 2, "be-killed", folder, check=False)
    assert killed.returncode and "Signal 9 (SIGKILL) received" in killed.stdout
    parts = parts_of("AdamW")
    with pytest.raises(ValueError, match="unfinished/AdamW is no checkpoint, or one whose saving did not end"):
        check_distributed_checkpoint(parts, training.checkpoint(folder, "unfinished", "AdamW"))
    run("training.py", 2, "go-on", folder)
    assert_same(torch.load(folder / "go-on-2.pt")["AdamW"], plain["AdamW"])


def parts_of(case: str, **changes: Any) -> dict[str, Any]:
    """What a checkpoint of a case is loaded into."""
    model, optimizer = training.made(case)
    optimizer.param_groups[0].update(changes)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def test_a_damaged_checkpoint_is_refused_before_anything_changes(folder: Path, sharded: Any, tmp_path: Path) -> None:
    sharded(2)
    source = training.checkpoint(folder, 2, "AdamW")
    parts = parts_of("AdamW")
    check_distributed_checkpoint(parts, source)

    def refused(damage: Callable[[Path], object], message: str, parts: dict[str, Any] = parts) -> None:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        damage(copy)
        with pytest.raises(ValueError, match=message):
            check_distributed_checkpoint(parts, copy)

    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1])

    refused(lambda copy: (copy / ".metadata").unlink(), "whose saving did not end")
    refused(lambda copy: truncate(copy / ".metadata"), r"\.metadata is damaged")
    refused(lambda copy: (copy / "__1_0.distcp").unlink(), r"__1_0.distcp is missing, which has a part of model\.")
    refused(lambda copy: truncate(copy / "__0_0.distcp"), r"__0_0.distcp is truncated: it lacks a part of optimizer\.")
    refused(lambda copy: None, "has no optimizer.state.square.max_exp_avg_sq_codes: it", parts_of("Adam, amsgrad"))
    message = r"square.exp_avg_scale has shape \(64, 1\) and must have \(64, 4\): .*convert_distributed_checkpoint"
    refused(lambda copy: None, message, parts_of("AdamW", block_size=64))
    message = "square.exp_avg in 8-bit codes, .*square.exp_avg is wanted in 32 bits: .*convert_distributed_checkpoint"
    refused(lambda copy: None, message, parts_of("AdamW, 32 bits"))

    class App(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return parts

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match=r"has no app.model.square: it is another"):
        check_distributed_checkpoint({"app": App()}, source)
    dcp.load(parts, checkpoint_id=source)
