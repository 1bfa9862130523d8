"""What the site has beside its text: all public names, and pictures that the library's own functions draw."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PUBLIC = ("opt8bit", "opt8bit.optim", "opt8bit.quant", "opt8bit.nn", "opt8bit.ptq", "opt8bit.integrations.bitsandbytes")
PAGES = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
SHOWN = [path.rpartition(".") for path in re.findall(r"^::: (\S+)$", PAGES, re.MULTILINE)]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_api(name: str) -> None:
    module = importlib.import_module(name)
    public = {each: getattr(module, each) for each in module.__all__ if each != "ptq"}  # a module
    shown = [getattr(importlib.import_module(place), each) for place, _, each in SHOWN if place in PUBLIC]
    assert [each for each, value in public.items() if value not in shown] == []


def test_the_pictures_are_drawn_by_the_library(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "tools" / "pictures.py"))["main"](tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "pictures").iterdir())
    page = (DOCS / "how-it-works.md").read_text()
    assert sorted(re.findall(r"\]\(pictures/(.+?)\)", page)) == drawn
