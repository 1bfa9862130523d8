from pathlib import Path
from typing import Any

import pytest
import torch
from toys import MODELS


@pytest.fixture(autouse=True, scope="module")
def repeatable(one_thread: None) -> None:
    """What is computed twice has the same bits twice."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of one token per byte, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models")
    model: Any = MODELS["llama"]()
    model.save_pretrained(path / "llama")
    words = {f"{number}": number for number in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path / "llama")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(96, (600,), generator=generator).tolist()
    (path / "text.txt").write_text(" ".join(map(str, ids)))
    return path
