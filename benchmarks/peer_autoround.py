"""How good, and how fast, is AutoRound on the same model, texts and windows as compress.py?

    python -m venv peer && peer/bin/pip install torch auto-round
    peer/bin/python benchmarks/peer_autoround.py MODEL --calibration FILE --test FILE --output FOLDER [--bits 2]

In an environment of its own, as its dependencies are. Asymmetric grids; perplexity as ``opt8bit evaluate`` has it, of
the model in memory. FOLDER gets the packed checkpoint, for ``correct_peers.py``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
from peer_measuring import append_row, parser_of, perplexity, windows
from transformers import AutoModelForCausalLM, AutoTokenizer


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
    append_row(
        options,
        ("auto-round",),
        recipe=f"AutoRound, {options.iterations} iterations",
        group_size=options.group,
        test=test,
        seconds=seconds,
    )


def parsed() -> argparse.Namespace:
    parser = parser_of(__doc__, "peer_autoround.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the packed checkpoint")
    parser.add_argument("--format", default="auto_round", help="of the checkpoint, as AutoRound names it")
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale (default 64)")
    parser.add_argument("--iterations", type=int, default=200, help="of each block (default 200, as AutoRound's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
