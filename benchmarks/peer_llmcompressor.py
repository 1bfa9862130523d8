"""How good, and how fast, is llm-compressor's GPTQ on the same model, texts and windows?

    python -m venv peer && peer/bin/pip install torch llmcompressor
    peer/bin/python benchmarks/peer_llmcompressor.py MODEL --calibration FILE --test FILE

In an environment of its own, as its dependencies are. Its 3-bit asymmetric scheme with groups of 64, 64 windows of 512
tokens; perplexity as ``opt8bit evaluate`` has it.
"""

from __future__ import annotations

import argparse
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
from llmcompressor.modifiers.quantization import GPTQModifier  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH, SAMPLES, WINDOWS = 512, 64, 20


def windows(path: Path, tokenizer: Any, samples: int) -> torch.Tensor:
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return ids[: samples * LENGTH].view(samples, LENGTH)


@torch.no_grad()
def perplexity(model: Any, samples: torch.Tensor) -> float:
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in samples]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=Path("peer_llmcompressor.jsonl"), help="where to append the row")
    options = parser.parse_args()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    calibration = windows(options.calibration, tokenizer, SAMPLES)
    dataset = Dataset.from_dict(
        {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    )
    weights = QuantizationArgs(
        num_bits=options.bits, symmetric=False, strategy=QuantizationStrategy.GROUP, group_size=64
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    calibrating = time.perf_counter()
    oneshot(model=model, dataset=dataset, recipe=recipe, max_seq_length=LENGTH, num_calibration_samples=SAMPLES)
    seconds = time.perf_counter() - calibrating
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
    whole_seconds = time.perf_counter() - started
    row = {
        "recipe": "llm-compressor, gptq",
        "bits": options.bits,
        "test": perplexity(model, windows(options.test, tokenizer, WINDOWS)),
        "seconds": seconds,
        "whole_seconds": whole_seconds,  # from loading to the written checkpoint
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    print(row)
    with options.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
