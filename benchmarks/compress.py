"""How good is a compressed language model, by rounding method, correction, width and group?

    pip install ".[compress,demo]"
    python benchmarks/compress.py MODEL --calibration FILE --test FILE [--bits 4 3 2] [--groups 64 row]

Perplexity on windows of the test text, which nothing was chosen by, and the KL divergence of the predictions there from
the model's own, in nats a token; seconds of rounding and correcting; the peak memory of a process that does nothing
else; bits per weight with scales and zero points counted, and the bytes of the biases.
Grids are asymmetric where a recipe's name does not say otherwise. Methods are as their papers have them (ranges from
the least to the largest weight, no error propagation), but for ``default``, which is what ``compress`` does when it is
told nothing. Corrections are those of ``compress``; "by position" has one bias for each position of a window. A run
that has a row is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, complete, peak_bytes, plot

from opt8bit import ptq
from opt8bit.cli.models import load, load_tokenizer
from opt8bit.cli.texts import find_text, first_windows
from opt8bit.ptq.model.source import digest
from opt8bit.ptq.pairs.choice import kl_divergence
from opt8bit.recipe.recipe import CORRECTIONS

PAPER: dict[str, Any] = {"range": "minmax", "error_propagation": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": ptq.RTN(), **PAPER},
    "gptq": {"method": ptq.GPTQ(), **PAPER},
    "quantease": {"method": ptq.QuantEase(), **PAPER},
    "gptq + quantease": {"method": ptq.QuantEase(start=ptq.GPTQ()), **PAPER},
    "default": {},
}
RECIPES: dict[str, dict[str, Any]] = {
    name if correct == "none" else f"{name}, bias {correct}": {**method, "bias_correction": correct}
    for name, method in METHODS.items()
    for correct in CORRECTIONS
    if not (name == "rtn" and correct == "joint")  # RTN looks at no inputs, and would round as ever
}
RECIPES |= {
    f"{name}, bias local, by position": {**METHODS[name], "bias_correction": "local", "statistic": "position"}
    for name in ("rtn", "gptq", "quantease")
}
RECIPES |= {
    "default, symmetric": {"symmetric": True},
    "default, symmetric restricted": {"symmetric": "restricted"},
    "default, weighted by the loss": {"loss_weighting": "tokens"},
    "default, weighted by the loss, power 1": {"loss_weighting": ptq.LossWeighting(power=1.0)},
}
SIZES = {"samples": 64, "windows": 20, "length": 512}
QUICK_SIZES = {"samples": 2, "windows": 2, "length": 64}
QUICK_RECIPES = [
    "rtn",
    "gptq, bias local",
    "default, bias joint",
    "quantease, bias local, by position",
    "default, weighted by the loss",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a checkpoint in safetensors, or id of the hub")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--bits", type=int, nargs="+", help="(default 3 4 2)")
    parser.add_argument("--groups", nargs="+", help='weights that share a scale, or "row" (default 64 row)')
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, metavar="RECIPE", help="(default all)")
    parser.add_argument("--samples", type=int, help=f"windows of calibration (default {SIZES['samples']})")
    parser.add_argument("--windows", type=int, help=f"windows of the perplexity (default {SIZES['windows']})")
    parser.add_argument("--length", type=int, help=f"tokens of a window (default {SIZES['length']})")
    parser.add_argument("--bos", action="store_true", help="begin each window with the token that begins a text")
    options = arguments(parser, "compress")
    usual = QUICK_SIZES if options.quick else SIZES
    recipes = options.recipes or (QUICK_RECIPES if options.quick else list(RECIPES))
    all_bits = options.bits or ([3] if options.quick else [3, 4, 2])
    groups = options.groups or (["64"] if options.quick else ["64", "row"])
    sizes = {name: getattr(options, name) or size for name, size in usual.items()}
    tokenizer, length, bos = load_tokenizer(options.model), sizes["length"], options.bos
    texts = {
        "calibration": first_windows(find_text(options.calibration), tokenizer, length, sizes["samples"], bos=bos),
        "test": first_windows(find_text(options.test), tokenizer, length, sizes["windows"], bos=bos),
    }

    def measure(**about: Any) -> list[dict[str, Any]]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(compressed, options.model, texts, about).result()
        quality = f"perplexity {found['test']:9.3f}, KL divergence {found['divergence']:.4f}"
        figures = f"{quality}, {found['seconds']:4.0f} s, {found['peak_bytes'] / 1e9:.2f} GB"
        print(f"{about['bits']} bits, group {about['group_size']}, {about['recipe']}: {figures}", flush=True)
        return [found]

    digests = {f"{name}_digest": digest([text]) for name, text in texts.items()}
    common = {"model": Path(options.model).name, **sizes, **digests}
    wanted = [{**common, "bits": None, "group_size": None, "recipe": "as it is"}]
    wanted += [
        {**common, "bits": bits, "group_size": None if group == "row" else int(group), "recipe": recipe}
        for group, bits, recipe in itertools.product(groups, all_bits, recipes)
    ]
    show(complete(options.rows, wanted, measure), options.rows)


def compressed(model_name: str, texts: dict[str, torch.Tensor], about: dict[str, Any]) -> dict[str, Any]:
    model = load(model_name)
    started = time.perf_counter()
    if about["recipe"] == "as it is":
        bits_per_weight, bias_bytes = 8.0 * model.dtype.itemsize, 0
    else:
        recipe = {**RECIPES[about["recipe"]], "bits": about["bits"], "group_size": about["group_size"]}
        result = ptq.compress(model, texts["calibration"], **recipe)
        model, bits_per_weight, bias_bytes = result.compressed_model(), result.bits_per_weight, result.bias_bytes
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    return {
        "test": ptq.perplexity(model, texts["test"]),
        "divergence": divergence(model, load(model_name), texts["test"]),
        "seconds": seconds,
        "peak_bytes": peak,
        "bits_per_weight": bits_per_weight,
        "bias_bytes": bias_bytes,
        "dtype": str(model.dtype),
    }


@torch.no_grad()
def divergence(model: Any, original: Any, windows: torch.Tensor) -> float:
    """Returns the KL divergence of a model's predictions from the original's, in nats a token."""
    each = [
        kl_divergence(model(input_ids=window[None]).logits[0, :-1], original(input_ids=window[None]).logits[0, :-1])
        for window in windows
    ]
    return float(torch.cat(each).mean())


def show(rows: list[dict[str, Any]], path: Path) -> None:
    original, rows = rows[0], rows[1:]
    print(f"\nas it is: perplexity {original['test']:.3f}")
    widths = list(dict.fromkeys((row["group_size"], row["bits"]) for row in rows))
    heads = [f"{bits} bits, {'rows' if group is None else f'groups of {group}'}" for group, bits in widths]
    found = {(row["recipe"], row["group_size"], row["bits"]): row for row in rows}
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    for width, head in zip(widths, heads, strict=True):
        print(
            f"\n{head:<36}{'perplexity':>11}{'KL':>9}{'seconds':>9}{'peak GB':>9}{'bits/weight':>13}{'bias bytes':>12}"
        )
        for recipe in recipes:
            row = found[(recipe, *width)]
            taken = f"{row['seconds']:>9.0f}{row['peak_bytes'] / 1e9:>9.2f}"
            quality = f"{row['test']:>11.2f}{row.get('divergence', math.nan):>9.4f}"
            print(f"{recipe:<36}{quality}{taken}{row['bits_per_weight']:>13.2f}{row['bias_bytes']:>12,}")
    with plot(path, len(widths), height=5) as axes:
        for axis, width, head in zip(axes, widths, heads, strict=False):
            axis.barh(recipes, [found[(recipe, *width)]["test"] for recipe in recipes])
            axis.axvline(original["test"], color="black")
            axis.set_xscale("log")
            axis.invert_yaxis()
            axis.set_title(f"{head}: perplexity")


if __name__ == "__main__":
    main()
