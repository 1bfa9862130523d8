"""Every Python block of README and docs/ runs as it stands there.

Each runs by itself, in an empty folder, with what readers have of their own (:func:`readers_own`). A comment on the
line before a block says otherwise: ``<!-- not run: the reason -->`` has it compiled only, ``<!-- needs module -->`` has
it run where that module is installed. The blocks of docs/extending are run by test_extending.py.
"""

import copy
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.integrations.bitsandbytes import uninstall
from opt8bit.quant import UniformGrid

ROOT = Path(__file__).parents[2]
EXTENDING = ROOT / "docs" / "extending"
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent != EXTENDING)]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?(?P<fence> *```python\n)(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE
)
MARKS = re.compile(r"not run: .+|needs \w+")


class Block(NamedTuple):
    """A block of a page, and what the comment before it says."""

    place: str
    code: CodeType
    mark: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in BLOCK.finditer(text):
        lines_before = text[: match.start("code")].count("\n")
        code = "\n" * lines_before + textwrap.dedent(match["code"])  # so that errors name the line of the page
        name = str(page.relative_to(ROOT))
        yield Block(f"{name}:{lines_before + 1}", compile(code, name, "exec", dont_inherit=True), match["mark"])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def rounded(module: Any) -> Any:
    """A copy of a model whose matrices have 3 bits."""
    found, grid = copy.deepcopy(module), UniformGrid(3)
    for layer in found.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = grid.nearest(layer.weight.data, grid.fit(layer.weight.data))
    return found


def language_model() -> Any:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=96)).eval()


def stepped(p: Tensor) -> opt8bit.AdamW8bit:
    p.grad = torch.ones_like(p)
    optimizer = opt8bit.AdamW8bit([p])
    optimizer.step()
    return optimizer


def readers_own() -> dict[str, Any]:
    """What examples take as given, by the names that they have for it."""
    torch.manual_seed(0)
    model, layer, p = language_model(), nn.Linear(64, 32), nn.Parameter(torch.ones(64, 64))
    ids = torch.randint(96, (16, 16))
    return {
        "model": model,
        "quantized_model": rounded(model),
        "vocabulary": 96,
        "width": 64,
        "tokenizer": None,
        "token_ids": ids,
        "samples": [{"input_ids": each, "labels": each} for each in ids],
        "batches": ids[:8].split(4),
        "other_batches": ids[8:].split(4),
        "body": nn.Linear(64, 64),
        "head": nn.Linear(64, 96),
        "layer": layer,
        "quantized_layer": rounded(layer),
        "x": torch.randn(8, 16, 64),
        "channel_size": 32,
        "channel_axis": -1,
        "p": p,
        "optimizer": stepped(p),
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test in an empty folder, and takes away what its example has installed."""
    monkeypatch.chdir(tmp_path)
    yield
    uninstall()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_the_block_runs(block: Block) -> None:
    if block.mark is not None and block.mark.startswith("not run"):
        pytest.skip(block.mark)
    if block.mark is not None:
        pytest.importorskip(block.mark.removeprefix("needs "))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other people's packages warn of is theirs
        exec(block.code, {"__name__": "__main__", **readers_own()})


def test_no_block_is_overlooked() -> None:
    assert len(BLOCKS) == sum(len(re.findall("```python", page.read_text())) for page in PAGES)
    assert [block.place for block in BLOCKS if block.mark is not None and not MARKS.fullmatch(block.mark)] == []
