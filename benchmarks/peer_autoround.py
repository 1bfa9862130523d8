"""How good, and how fast, is AutoRound on the same model, texts and windows as compress.py?

    python -m venv peer && peer/bin/pip install torch auto-round
    peer/bin/python benchmarks/peer_autoround.py MODEL --calibration FILE --test FILE --output FOLDER [--bits 2]

In an environment of its own, as its dependencies are. Asymmetric grids; perplexity as ``opt8bit evaluate`` has it, of
the model in memory. FOLDER gets the packed checkpoint, for ``correct_peers.py``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer


def windows(path: Path, tokenizer: Any, samples: int, length: int) -> torch.Tensor:
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return ids[: samples * length].view(samples, length)


@torch.no_grad()
def perplexity(model: Any, samples: torch.Tensor) -> float:
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in samples]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    options = parsed()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    calibration = windows(options.calibration, tokenizer, options.samples, options.length)
    started = time.perf_counter()
    rounding = AutoRound(
        model,
        tokenizer,
        scheme={"bits": options.bits, "group_size": options.group, "sym": False, "data_type": "int", "act_bits": 16},
        iters=options.iterations,
        seqlen=options.length,
        nsamples=options.samples,
        dataset=[{"input_ids": window[None]} for window in calibration],
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize()
    seconds = time.perf_counter() - started
    test = perplexity(rounding.model, windows(options.test, tokenizer, options.windows, options.length))
    rounding.save_quantized(str(options.output), format=options.format)
    row = {
        "model": Path(options.model).name,
        "recipe": f"AutoRound, {options.iterations} iterations",
        "bits": options.bits,
        "group_size": options.group,
        "samples": options.samples,
        "windows": options.windows,
        "length": options.length,
        "test": test,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("auto-round", "torch", "transformers")},
    }
    print(row)
    with options.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the packed checkpoint")
    parser.add_argument("--format", default="auto_round", help="of the checkpoint, as AutoRound names it")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale (default 64)")
    parser.add_argument("--iterations", type=int, default=200, help="of each block (default 200, as AutoRound's)")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--windows", type=int, default=20, help="windows of the perplexity")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rows", type=Path, default=Path("peer_autoround.jsonl"), help="where to append the row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
