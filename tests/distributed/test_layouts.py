"""Each check of layouts.py, as the processes of one start have found it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

from layouts import CHECKS
from processes import run


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("layouts")
    for ranks in CHECKS:
        run("layouts.py", ranks, folder / f"{ranks}.json")
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in CHECKS}


@pytest.mark.parametrize(("ranks", "check"), [(ranks, check.__name__) for ranks, of in CHECKS.items() for check in of])
def test_of(ranks: int, check: str, errors: dict[int, dict[str, str]]) -> None:
    assert not errors[ranks][check], errors[ranks][check]
