"""What the site has beside its text: all public names, pictures that scripts draw, and links that lead somewhere."""

import importlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
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
    assert drawn == sorted(path.name for path in (DOCS / "pictures").glob("*.svg"))
    page = (DOCS / "how-it-works.md").read_text()
    assert sorted(re.findall(r"\]\(pictures/(.+?)\)", page)) == drawn


def figures(picture: Path) -> Any:
    """What the metadata of a picture say that it shows."""
    from PIL import Image  # which matplotlib needs

    with Image.open(picture) as image:
        return json.loads(image.info["Description"])


def test_readmes_pictures_show_the_rows_of_the_benchmarks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "tools" / "measured_pictures.py"))["main"](tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "pictures").glob("*.png"))
    for name in drawn:
        assert figures(DOCS / "pictures" / name) == figures(tmp_path / name), f"{name}: draw it again"
    readme = (ROOT / "README.md").read_text()
    assert sorted(re.findall(r"!\[.+\]\(docs/pictures/(.+?)\)", readme)) == drawn


def test_on_pypi_readmes_links_lead_to_the_release() -> None:
    absolute = runpy.run_path(str(DOCS / "tools" / "absolute_links.py"))["absolute"]
    text = "![p](docs/p.png) [`a`](docs/a.md#b), [c](#c) and [d](https://d.org/e)\n"
    moved = (
        "![p](https://h/o/raw/v1/docs/p.png) [`a`](https://h/o/blob/v1/docs/a.md#b), [c](#c) and [d](https://d.org/e)\n"
    )
    assert absolute(text, "https://h/o", "v1") == moved
    links = re.findall(r"\]\((.+?)\)", absolute((ROOT / "README.md").read_text(), "https://h/o", "v1"))
    assert links and all(link.startswith(("https://", "#")) for link in links)
