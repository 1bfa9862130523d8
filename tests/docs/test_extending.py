"""The examples of docs/extending do what they say."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from opt8bit.recipe import registry

DOCS = Path(__file__).parents[2] / "docs" / "extending"
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "README")
KINDS = ("activation", "format", "grid", "optimizer", "reconstruction", "rounding", "transform")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def example(page: str) -> str:
    (found,) = BLOCK.findall((DOCS / f"{page}.md").read_text())
    return found


def small_model() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.copy_(torch.randn(param.shape, generator=generator) * param.shape[1] ** -0.5)
    return model.eval()


@pytest.mark.parametrize("page", PAGES)
def test_the_example_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats: Any = registry.FORMATS
    monkeypatch.setattr(formats, "_found", dict(formats._found))
    ids = torch.randint(96, (48, 16), generator=torch.Generator().manual_seed(1))
    names = {"__name__": "__main__", "model": small_model(), "ids": ids, "folder": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without what this file's own first line says of annotations: examples are modules of their own.
        exec(compile(example(page), f"{page}.md", "exec", dont_inherit=True), names)


def test_every_page_is_listed_and_every_registry_is_extended() -> None:
    listed = re.findall(r"\]\((\w+)\.md\)", (DOCS / "README.md").read_text())
    assert sorted(listed) == PAGES == sorted(KINDS)


@pytest.mark.parametrize("page", PAGES)
def test_examples_fit_on_a_screen(page: str) -> None:
    code = example(page).partition('if __name__ == "__main__":')[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 50
