"""Each check of layouts.py, as the processes of one start have found it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

from layouts import CHECKS
from processes import run


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("layouts")

    @functools.cache
    def found(ranks: int) -> dict[str, str]:
        run("layouts.py", ranks, folder / f"{ranks}.json")
        return json.loads((folder / f"{ranks}.json").read_text())

    return found


def marks(ranks: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if ranks > 2 else []


@pytest.mark.parametrize(
    ("ranks", "check"),
    [pytest.param(ranks, check.__name__, marks=marks(ranks)) for ranks, of in CHECKS.items() for check in of],
)
def test_of(ranks: int, check: str, errors: Callable[[int], dict[str, str]]) -> None:
    assert not errors(ranks)[check], errors(ranks)[check]
