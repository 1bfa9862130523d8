"""How good, and how fast, are llm-compressor's GPTQ, AWQ and RTN on the same model, texts and windows as compress.py?

    python -m venv peer && peer/bin/pip install torch llmcompressor
    peer/bin/python benchmarks/peer_llmcompressor.py MODEL --calibration FILE --test FILE [--method awq] [--bits 4]

In an environment of its own, as its dependencies are. Asymmetric grids; perplexity as ``opt8bit evaluate`` has it.
With ``--output FOLDER`` the packed checkpoint is kept, for ``correct_peers.py``.
"""

from __future__ import annotations

import argparse
import contextlib
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
from peer_measuring import append_row, parser_of, perplexity, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

if not torch.accelerator.is_available():  # 0.14's AWQ pins memory all the same, and fails
    IntermediatesCache.pin_memory = lambda *_: None


def recipe(method: str, bits: int, group_size: int | None) -> list[Any]:
    strategy = QuantizationStrategy.GROUP if group_size else QuantizationStrategy.CHANNEL
    weights = QuantizationArgs(num_bits=bits, symmetric=False, strategy=strategy, group_size=group_size)
    scheme = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    if method == "gptq":
        return [GPTQModifier(**scheme, ignore=["lm_head"])]
    rounded = QuantizationModifier(**scheme, ignore=["lm_head"])
    return [rounded] if method == "rtn" else [AWQModifier(), rounded]


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
    append_row(
        options,
        ("llmcompressor",),
        recipe=f"llm-compressor, {options.method}",
        group_size=group_size,
        test=perplexity(model, windows(options.test, tokenizer, options.windows, options.length)),
        seconds=seconds,
        whole_seconds=whole_seconds,  # from loading to the written checkpoint
        peak_bytes=peak,
    )


def parsed() -> argparse.Namespace:
    parser = parser_of(__doc__, "peer_llmcompressor.jsonl")
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), default="gptq")
    parser.add_argument("--group", default="64", help='weights that share a scale, or "row" (default 64)')
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the packed checkpoint (default: not kept)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
