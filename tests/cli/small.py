"""Options for small models, and how their checkpoints are loaded."""

from pathlib import Path
from typing import Any

WINDOWS = ["--samples", "8", "--sequence-length", "16", "--group-size", "16"]
SMALL = [*WINDOWS, "--format", "dense"]


def loaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)
