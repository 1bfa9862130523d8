"""Every docstring says what the thing is or does: functions begin with a verb, nothing begins with a fragment."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import opt8bit

PACKAGE = Path(opt8bit.__file__).parent
VERB = re.compile(r"[A-Z][a-z]+s|Is|Does|Has|Goes")
NOUNS = set(  # plurals that look like verbs
    """Addresses Arguments Arrays Biases Bits Blocks Bytes Elements Errors Experts Figures Files Gradients Grids
    Indices Inputs Layers Lines Losses Means Models Modules Names Numbers Options Outputs Parameters Products Rows
    Samples Scales Shapes Sizes States Statistics Tensors Texts This Tokens Types Values Weights Windows""".split()
)
FRAGMENTS = set(  # what begins neither a sentence nor the name of a thing
    """As At Before Behind Beside By For From How If In Inside Of On One's So That Those Until What When Where Which
    While Who Whose Why With""".split()
)
SECTIONS = {"Args:", "Raises:", "Returns:"}


class Docstring(NamedTuple):
    """A docstring, and the kind of thing that it is of."""

    place: str
    kind: str
    text: str


def docstrings(path: Path) -> Iterator[Docstring]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield Docstring(f"{path.relative_to(PACKAGE)}:{node.body[0].lineno}", kind_of(node), text)


def kind_of(node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef):
        return "thing"
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return "thing" if {"property", "cached_property"} & set(decorators) else "function"


def flaw(docstring: Docstring) -> str | None:
    """Returns what is wrong with a docstring, or None."""
    first, word = docstring.text.split("\n\n")[0], docstring.text.split()[0].rstrip(",")
    if word in SECTIONS:  # a check of which there is nothing to say but what it raises
        return None
    if not first.rstrip().endswith((".", ":", "::")):
        return "has no end"
    if docstring.kind == "function" and (VERB.fullmatch(word) is None or word in NOUNS):
        return "begins with no verb"
    if docstring.kind == "thing" and (word in FRAGMENTS or (not word[0].isalpha() and word[0] != "`")):
        return "begins with a fragment"
    return None


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda path: path.name)
def test_docstrings_are_sentences(folder: Path) -> None:
    found = [each for path in sorted(folder.glob("*.py")) for each in docstrings(path)]
    assert [f"{each.place} {flaw(each)}: {each.text.splitlines()[0]}" for each in found if flaw(each)] == []


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("function", "Returns the dimension that a placement shards, or None.", None),
        ("function", "That a placement shards; None where it shards none.", "begins with no verb"),
        ("function", "Whether a step can be captured.", "begins with no verb"),
        ("function", "Bytes of the states.", "begins with no verb"),
        ("function", "Returns the bytes of the states", "has no end"),
        ("function", "Raises:\n    ValueError: it is negative.", None),
        ("thing", "The bytes of the states.", None),
        ("thing", "That biases take beyond what the model had.", "begins with a fragment"),
    ],
)
def test_fragments_are_told_from_sentences(kind: str, text: str, expected: str | None) -> None:
    assert flaw(Docstring("here", kind, text)) == expected
