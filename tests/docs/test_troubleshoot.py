"""The messages that docs/troubleshoot.md explains are those of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import opt8bit

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshoot.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", PAGE, re.MULTILINE)
FIELD = re.compile(r"\{[^{}]*\}")  # of a text that is formatted later


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts in a module, with dots for what is put into them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield FIELD.sub("…", node.value)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """All that the package can say."""
    modules = Path(opt8bit.__file__).parent.rglob("*.py")
    return [text for module in modules for text in texts(ast.parse(module.read_text()))]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_so(message: str, said: list[str]) -> None:
    assert any(message.strip("… ") in text for text in said)


def test_every_row_has_a_message() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "| message |" not in line]
    assert len(rows) == len(MESSAGES) > 40
