"""FSDP2 and distributed checkpoints: whatever the number of processes, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

import training
from processes import run
from training import CASES

RANKS = (1, 2, 4)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's word on one process alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process makes of plain tensors."""
    return training.train(folder, "plain")


@pytest.fixture(scope="module")
def sharded(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """What so many processes make of shards."""
    for ranks in RANKS:
        run("training.py", ranks, "train", folder)
    return {ranks: torch.load(folder / f"train-{ranks}.pt") for ranks in RANKS}


@pytest.fixture(scope="module")
def resumed(folder: Path, plain: object, sharded: object) -> dict[tuple[Any, Any], dict[str, dict[str, Any]]]:
    """By who wrote the checkpoint and who went on from it."""
    found: dict[tuple[Any, Any], dict[str, dict[str, Any]]] = {}
    for ranks in RANKS:
        run("training.py", ranks, "resume", folder)
        found |= {(writer, ranks): of for writer, of in torch.load(folder / f"resume-{ranks}.pt").items()}
    return found | {(writer, "plain"): training.resume(folder, writer) for writer in ("plain", *RANKS)}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_same_bits_on_any_number_of_processes(ranks: int, case: str, plain: Any, sharded: Any) -> None:
    assert_same(sharded[ranks][case], plain[case])


def test_what_is_in_8_bits_is_decided_by_the_whole(plain: Any) -> None:
    coded = {name for name in training.SHAPES if f"{name}.exp_avg_absmax" in plain["AdamW"]}
    assert coded == {"square", "uneven", "few", "image"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reader", [*RANKS, "plain"])
@pytest.mark.parametrize("writer", ["plain", *RANKS])
def test_a_checkpoint_of_any_number_of_processes_goes_on_with_any_other(
    writer: Any, reader: Any, case: str, plain: Any, resumed: Any
) -> None:
    assert_same(resumed[writer, reader][case], plain[case])
