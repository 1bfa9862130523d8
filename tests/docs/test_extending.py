"""The examples of docs/extending do what they say."""

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from opt8bit import ptq
from opt8bit.recipe import registry

DOCS = Path(__file__).parents[2] / "docs" / "extending"
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "README")
KINDS = ("activation", "format", "grid", "optimizer", "reconstruction", "rounding", "transform")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def example(page: str) -> str:
    (found,) = BLOCK.findall((DOCS / f"{page}.md").read_text())
    return found


def given() -> dict[str, Any]:
    """What the examples need, as the README makes it."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(example("README"), "README.md", "exec", dont_inherit=True), names)
    return {name: names[name] for name in ("model", "ids")}


@pytest.mark.parametrize("page", PAGES)
def test_the_example_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats: Any = registry.FORMATS
    monkeypatch.setattr(formats, "_found", dict(formats._found))
    names = {"__name__": "__main__", "folder": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names |= given()
        # Without what this file's own first line says of annotations: examples are modules of their own.
        exec(compile(example(page), f"{page}.md", "exec", dont_inherit=True), names)


def test_every_page_is_listed_and_every_registry_is_extended() -> None:
    listed = re.findall(r"\]\((\w+)\.md\)", (DOCS / "README.md").read_text())
    assert sorted(listed) == PAGES == sorted(KINDS)


@pytest.mark.parametrize("page", PAGES)
def test_examples_fit_on_a_screen(page: str) -> None:
    code = example(page).partition('if __name__ == "__main__":')[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 50


def test_all_that_is_public_has_its_reason() -> None:
    said = (DOCS.parent / "names.md").read_text()
    assert [name for name in ptq.__all__ if f"`{name}`" not in said] == []
    for name, place in re.findall(r"`(\w+)`[^|]*\|[^|]*\| `(opt8bit\.[\w.]+)`", said):
        assert getattr(importlib.import_module(place), name) is getattr(ptq, name)
