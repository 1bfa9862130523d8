"""Language models and texts, as the commands take them. No pickle is read, and no remote code run unless asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CommandError(Exception):
    """Something the user can mend."""


def transformers() -> Any:
    """
    Raises:
        CommandError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CommandError(f"{error.name or 'transformers'} is missing: pip install 'opt8bit[compress]'") from error


def load(name: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A causal language model, in its own dtype, and its tokenizer.

    Args:
        name: a folder with a checkpoint in safetensors, or the id of a model on the hub.
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        CommandError: it cannot be loaded.
    """
    library = transformers()
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CommandError(f"{name!r} has no config.json")
    if not folder.exists() and name.startswith((".", "~", "/")):
        raise CommandError(f"there is no folder {name!r}")
    where = str(folder) if folder.is_dir() else name
    try:
        model = library.AutoModelForCausalLM.from_pretrained(
            where, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = library.AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # a model is anyone's, and so is what transformers raises on it
        lines = str(error).strip().splitlines()
        raise CommandError(f"cannot load {name!r}: {lines[0] if lines else type(error).__name__}") from error
    return model.eval(), tokenizer


def tokens(path: Path, tokenizer: Any) -> Tensor:
    """A text's tokens, (n,): the whole file at once.

    Raises:
        CommandError: the file cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {str(path)!r}: {error}") from error
    # A text longer than the model's context is meant here: it is cut into windows.
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
