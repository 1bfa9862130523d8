"""The new lines of docs/coming-from.md work: code runs, flags are flags of the command, and recipes are recipes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import opt8bit
from opt8bit.cli.parser import parser
from opt8bit.cli.recipes import read_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
ROWS = [row for row in re.findall(r"^\| (.+) \| (.+) \|$", PAGE, re.MULTILINE) if row[0] != "old"]
LINES = sorted({line for _, new in ROWS for line in re.findall("`([^`]+)`", new)})
NEEDED = "opt8bit compress MODEL --calibration TEXT --output DIR "


def readers_own() -> dict[str, Any]:
    params = [nn.Parameter(torch.ones(64, 64))]
    optimizer = opt8bit.AdamW8bit(params)
    return {
        "opt8bit": opt8bit,
        "optimizer": optimizer,
        "params": params,
        "param": params[0],
        "x": params[0],
        "saved": optimizer.state_dict(),
        "lr": 0.1,
        "momentum": 0.9,
        "vocabulary": 96,
        "width": 64,
    }


@pytest.mark.parametrize("line", LINES)
def test_the_new_line_works(line: str, tmp_path: Path) -> None:
    if line.startswith("{"):
        recipe = tmp_path / "recipe.json"
        recipe.write_text(line)
        read_recipe(recipe)
    elif line.startswith(("opt8bit ", "--")):
        command = line if line.startswith("opt8bit ") else NEEDED + line
        parser().parse_args(shlex.split(command)[1:])
    else:
        exec(line.replace(", ...", ""), readers_own())


def test_every_row_has_a_line() -> None:
    assert len(ROWS) > 30
    assert [row for row in ROWS if "`" not in row[1]] == []
