"""What does learning buy after the closed form, and what does it take?

    pip install ".[compress,demo]"
    python benchmarks/learned.py MODEL --calibration FILE --test FILE [--bits 4 3 2] [--learn fast balanced best]

Perplexity on windows of the test text, which nothing was chosen by, and the KL divergence of the predictions there from
the model's own, in nats a token; seconds of the closed form and of learning; peak memory of a process that does nothing
else. Grids are asymmetric, in groups of 64, and layers are rounded as ``compress`` does when it is told nothing else.
An effort goes on from layers that are rounded on seven eighths of the text, as ``compress`` does it when it learns.
The loss on windows of the calibration text that are not learned from, by which the parameters were chosen, is in the
rows, too. A width that has rows is not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compress import QUICK_SIZES, SIZES, divergence
from measuring import arguments, complete, peak_bytes, plot

from opt8bit import ptq
from opt8bit.cli.models import load, load_tokenizer
from opt8bit.cli.texts import find_text, first_windows
from opt8bit.ptq.model.source import digest
from opt8bit.ptq.refinement.refine import set_aside
from opt8bit.recipe.learning import EFFORTS

GROUP_SIZE = 64
LEARNED = [name for name, effort in EFFORTS.items() if effort.steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a checkpoint in safetensors, or id of the hub")
    parser.add_argument("--calibration", required=True, help="text to calibrate on, and to learn from")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--bits", type=int, nargs="+", help="(default 3 2 4)")
    parser.add_argument("--learn", nargs="+", choices=LEARNED, help="(default all)")
    parser.add_argument("--bos", action="store_true", help="begin each window with the token that begins a text")
    options = arguments(parser, "learned")
    sizes = QUICK_SIZES if options.quick else SIZES
    efforts = options.learn or (["fast"] if options.quick else LEARNED)
    tokenizer, length = load_tokenizer(options.model), sizes["length"]
    texts = {
        name: first_windows(find_text(path), tokenizer, length, sizes[count], bos=options.bos)
        for name, path, count in [("calibration", options.calibration, "samples"), ("test", options.test, "windows")]
    }

    def measure(**about: Any) -> list[dict[str, Any]]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(refined, options.model, texts, about["bits"], efforts).result()

    digests = {f"{name}_digest": digest([text]) for name, text in texts.items()}
    common = {"model": Path(options.model).name, "group_size": GROUP_SIZE, **sizes, **digests}
    wanted = [{**common, "bits": bits} for bits in options.bits or ([3] if options.quick else [3, 2, 4])]
    show(complete(options.rows, wanted, measure), options.rows)


def refined(model_name: str, texts: dict[str, torch.Tensor], bits: int, efforts: list[str]) -> list[dict[str, Any]]:
    """Returns a row for the closed form, and one for each effort. Efforts go on from layers that are rounded once."""
    model, original = load(model_name), load(model_name)
    text = texts["calibration"]
    learned, chosen = (torch.cat([batch["input_ids"] for batch in part]) for part in set_aside([{"input_ids": text}]))
    rows: list[dict[str, Any]] = []
    start, closed_form = rounded(model, text, bits)
    for effort in ["none", *efforts]:
        started, result = time.perf_counter(), start
        if effort != "none":
            numbers = asdict(EFFORTS[effort])
            result = ptq.refine(start, learned, **numbers, choose_by=chosen)
        learning, peak = time.perf_counter() - started, peak_bytes()
        compressed = result.compressed_model()
        found = {
            "learn": effort,
            "test": ptq.perplexity(compressed, texts["test"]),
            "divergence": divergence(compressed, original, texts["test"]),
            "closed_form_seconds": closed_form,
            "learning_seconds": learning,
            "peak_bytes": peak,
            "refined": None if result.refined is None else asdict(result.refined),
        }
        print(
            f"{bits} bits, {effort}: perplexity {found['test']:.3f}, {closed_form:.0f} + {learning:.0f} s", flush=True
        )
        rows.append(found)
        if effort == "none":
            start, closed_form = rounded(model, learned, bits)
    return rows


def rounded(model: Any, text: torch.Tensor, bits: int) -> tuple[ptq.Result, float]:
    """Returns the closed form's result, and the seconds that it took."""
    started = time.perf_counter()
    result = ptq.compress(model, text, bits=bits, group_size=GROUP_SIZE)
    return result, time.perf_counter() - started


def show(rows: list[dict[str, Any]], path: Path) -> None:
    print(f"\n{'bits':<6}{'learning':<12}{'perplexity':>11}{'KL':>9}{'seconds':>9}{'peak GB':>9}")
    for row in rows:
        seconds, peak = row["closed_form_seconds"] + row["learning_seconds"], row["peak_bytes"] / 1e9
        quality = f"{row['test']:>11.2f}{row['divergence']:>9.4f}"
        print(f"{row['bits']:<6}{row['learn']:<12}{quality}{seconds:>9.0f}{peak:>9.2f}")
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    with plot(path, len(widths)) as axes:
        for axis, bits in zip(axes, widths, strict=False):
            own = [row for row in rows if row["bits"] == bits]
            seconds = [row["closed_form_seconds"] + row["learning_seconds"] for row in own]
            axis.plot(seconds, [row["test"] for row in own], marker="o")
            for row, x in zip(own, seconds, strict=True):
                axis.annotate(row["learn"], (x, row["test"]))
            axis.set_xlabel("seconds")
            axis.set_title(f"{bits} bits: perplexity")


if __name__ == "__main__":
    main()
