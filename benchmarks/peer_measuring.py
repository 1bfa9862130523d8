"""What the scripts share that measure other quantizers. Needs no package of ours: they run where the peers are."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import torch


def windows(path: Path, tokenizer: Any, samples: int, length: int) -> torch.Tensor:
    """The first windows of a text, (samples, length)."""
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return ids[: samples * length].view(samples, length)


@torch.no_grad()
def perplexity(model: Any, samples: torch.Tensor) -> float:
    """As ``opt8bit evaluate`` has it."""
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in samples]
    return math.exp(sum(losses) / len(losses))


def parser_of(description: str | None, rows: str) -> argparse.ArgumentParser:
    """A parser that has the model, the texts, their sizes, and ``rows``, the file for the rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--windows", type=int, default=20, help="windows of the perplexity")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rows", type=Path, default=Path(rows), help="where to append the row")
    return parser


def append_row(options: argparse.Namespace, packages: tuple[str, ...], **measured: Any) -> None:
    """Prints a row, and appends it to the file of rows."""
    row = {
        "model": Path(options.model).name,
        "bits": options.bits,
        "samples": options.samples,
        "windows": options.windows,
        "length": options.length,
        **measured,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in (*packages, "torch", "transformers")},
    }
    print(row)
    with options.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
