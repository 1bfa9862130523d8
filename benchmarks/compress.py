"""How good is a compressed language model, by rounding method, correction and width?

    pip install ".[compress]"
    python benchmarks/compress.py MODEL --calibration FILE --test FILE [--bits 3 4] [--recipes gptq default]

Perplexity on windows of the test text, which nothing was chosen by, and on windows of the calibration text behind
those that calibrate; seconds of rounding and correcting; bits per weight with the scales counted. Every run is one
line of the rows' file as soon as it is done. Groups of 64, asymmetric grids.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measuring import machine

from opt8bit import ptq
from opt8bit.cli.models import load, tokens
from opt8bit.ptq.evaluate import windows

PAPER: dict[str, Any] = {"range": "minmax", "error_propagation": 0.0}  # as the methods' papers have them
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": ptq.RTN(), **PAPER},
    "rtn, bias local": {"method": ptq.RTN(), "correct": "local", **PAPER},
    "rtn, bias sequential": {"method": ptq.RTN(), "correct": "sequential", **PAPER},
    "gptq": {"method": ptq.GPTQ(), **PAPER},
    "gptq, bias local": {"method": ptq.GPTQ(), "correct": "local", **PAPER},
    "gptq, bias local, median": {"method": ptq.GPTQ(), "correct": "local", "statistic": "median", **PAPER},
    "gptq, bias local, by position": {"method": ptq.GPTQ(), "correct": "local", "statistic": "position", **PAPER},
    "gptq, bias sequential": {"method": ptq.GPTQ(), "correct": "sequential", **PAPER},
    "gptq, no act_order": {"method": ptq.GPTQ(act_order=False), **PAPER},
    "quantease": {"method": ptq.QuantEase(), **PAPER},
    "gptq + quantease": {"method": ptq.QuantEase(start=ptq.GPTQ()), **PAPER},
    "gptq, searched range": {"method": ptq.GPTQ(), "range": "mse", "error_propagation": 0.0},
    "quantease, 1% outliers": {"method": ptq.OutlierQuantEase(0.01), **PAPER},
    "default": {},
    "default, bias local": {"correct": "local", "error_propagation": 0.0},
    "default, bias sequential": {"correct": "sequential"},
    "default, bias joint": {"correct": "joint"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a checkpoint in safetensors, or id of the hub")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--test", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--windows", type=int, default=20, help="windows of each perplexity")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rows", type=Path, default=Path("compress.jsonl"), help="where to append the rows")
    options = parser.parse_args()
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, kernels {about['kernels']}, {about['versions']}")
    model, tokenizer = load(options.model)
    text = tokens(options.calibration, tokenizer)
    calibration = windows(text, options.length, options.samples)
    samples = {
        "held_out": windows(text[calibration.numel() :], options.length, options.windows),
        "test": windows(tokens(options.test, tokenizer), options.length, options.windows),
    }
    shared = {
        "model": Path(options.model).name,
        "samples": options.samples,
        "windows": options.windows,
        "length": options.length,
        "dtype": str(model.dtype),
        **about,
    }
    runs = [(bits, name) for bits in options.bits for name in options.recipes]
    whole = {name: ptq.perplexity(model, part) for name, part in samples.items()}
    print(f"{'as it is':<36} test {whole['test']:9.3f}  held out {whole['held_out']:9.3f}", flush=True)
    for bits, name in runs:
        row = {"bits": bits, "recipe": name, **measure(model, calibration, samples, bits, RECIPES[name])}
        print(
            f"{f'{bits} bits, {name}':<36} test {row['test']:9.3f}  held out {row['held_out']:9.3f}  "
            f"{row['seconds']:4.0f} s  {row['bits_per_weight']:.2f} bits",
            flush=True,
        )
        with options.rows.open("a") as file:
            file.write(json.dumps({**row, "original": whole, **shared}) + "\n")


def measure(
    model: Any, calibration: torch.Tensor, samples: dict[str, torch.Tensor], bits: int, recipe: dict[str, Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    result = ptq.compress(model, calibration, bits=bits, **recipe)
    seconds = time.perf_counter() - started
    compressed = result.compressed_model()
    return {
        **{name: ptq.perplexity(compressed, part) for name, part in samples.items()},
        "seconds": seconds,
        "bits_per_weight": result.bits_per_weight,
        "bias_bytes": result.bias_bytes,
    }


if __name__ == "__main__":
    main()
