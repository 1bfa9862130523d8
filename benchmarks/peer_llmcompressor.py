"""How good, and how fast, are llm-compressor's GPTQ, AWQ and RTN on the same model, texts and windows as compress.py?

    python -m venv peer && peer/bin/pip install torch llmcompressor
    peer/bin/python benchmarks/peer_llmcompressor.py MODEL --calibration FILE --test FILE [--method awq] [--bits 4]

In an environment of its own, as its dependencies are. Asymmetric grids; perplexity as ``opt8bit evaluate`` has it.
With ``--output FOLDER`` the packed checkpoint is kept, for ``correct_peers.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
)
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.quantization import (  # pyright: ignore[reportMissingImports]
    GPTQModifier,
    QuantizationModifier,
)
from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

if not torch.accelerator.is_available():  # 0.14's AWQ pins memory all the same, and fails
    IntermediatesCache.pin_memory = lambda *_: None


def windows(path: Path, tokenizer: Any, samples: int, length: int) -> torch.Tensor:
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return ids[: samples * length].view(samples, length)


def recipe(method: str, bits: int, group_size: int | None) -> list[Any]:
    strategy = QuantizationStrategy.GROUP if group_size else QuantizationStrategy.CHANNEL
    weights = QuantizationArgs(num_bits=bits, symmetric=False, strategy=strategy, group_size=group_size)
    scheme = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    if method == "gptq":
        return [GPTQModifier(**scheme, ignore=["lm_head"])]
    rounded = QuantizationModifier(**scheme, ignore=["lm_head"])
    return [rounded] if method == "rtn" else [AWQModifier(), rounded]


@torch.no_grad()
def perplexity(model: Any, samples: torch.Tensor) -> float:
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in samples]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    options = parsed()
    group_size = None if options.group == "row" else int(options.group)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    calibration = windows(options.calibration, tokenizer, options.samples, options.length)
    dataset = Dataset.from_dict(
        {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    )
    calibrating = time.perf_counter()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe(options.method, options.bits, group_size),
        max_seq_length=options.length,
        num_calibration_samples=options.samples,
    )
    seconds = time.perf_counter() - calibrating
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of a program that nothing large has started
    kept = contextlib.nullcontext(options.output) if options.output else tempfile.TemporaryDirectory()
    with kept as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    whole_seconds = time.perf_counter() - started
    row = {
        "model": Path(options.model).name,
        "recipe": f"llm-compressor, {options.method}",
        "bits": options.bits,
        "group_size": group_size,
        "samples": options.samples,
        "windows": options.windows,
        "length": options.length,
        "test": perplexity(model, windows(options.test, tokenizer, options.windows, options.length)),
        "seconds": seconds,
        "whole_seconds": whole_seconds,  # from loading to the written checkpoint
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    print(row)
    with options.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), default="gptq")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", default="64", help='weights that share a scale, or "row" (default 64)')
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--windows", type=int, default=20, help="windows of the perplexity")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the packed checkpoint (default: not kept)")
    parser.add_argument("--rows", type=Path, default=Path("peer_llmcompressor.jsonl"), help="where to append the row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
