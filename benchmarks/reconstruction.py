"""What does training blocks after they are rounded buy, by what is trained, on which loss and inputs?

    pip install ".[compress,demo]"
    python benchmarks/reconstruction.py MODEL --calibration FILE --test FILE [--bits 3 2] [--blocks 6]

The first blocks of a model are compressed, in groups of 64 on asymmetric grids, and those behind them stay as they are:
so a way to train them is known in minutes. A row has the KL divergence of the model's predictions on windows of the
test text from those without compression, in nats a token; the same of a model that has no blocks but these; the loss of
each block on windows that it did not learn from, before and after its training; and the seconds of it all. ``--blocks
0`` compresses the whole model. A run that has a row is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from compress import divergence
from measuring import arguments, complete, plot

from opt8bit import ptq
from opt8bit.cli.models import load, load_tokenizer
from opt8bit.cli.texts import find_text, first_windows
from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.model.source import digest
from opt8bit.ptq.result import install

SIGNED: dict[str, Any] = {"optimizer": ptq.SignSGD, "schedule": "linear"}
# By name: what the recipe has, what is trained, and options of the engine.
VARIANTS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "closed form": ({}, None, {}),
    "scales": ({}, ptq.TrainScales(), {}),
    "rounding": ({}, ptq.TrainRounding(), {}),
    "rounding, float32": ({}, ptq.TrainRounding(), {"bfloat16": False}),
    "rounding, torch's Adam": ({}, ptq.TrainRounding(), {"optimizer": torch.optim.Adam}),
    "rounding, three times the rate": ({}, ptq.TrainRounding(lr=1e-2), {}),
    "rounding, SignSGD": ({}, ptq.TrainRounding(2e-3, 1e-3), SIGNED),
    "rounding, the float block's output": ({}, ptq.TrainRounding(), {"propagation": 0.0}),
    "rounding, half of the drift": ({}, ptq.TrainRounding(), {"propagation": 0.5}),
    "rounding, float inputs": ({}, ptq.TrainRounding(), {"float_inputs": 1.0}),
    "rounding, mixed inputs": ({}, ptq.TrainRounding(), {"float_inputs": 0.5}),
    "rounding, tokens capped": ({}, ptq.TrainRounding(), {"token_cap": 2.0}),
    "rounding to nearest": ({"method": "rtn"}, None, {}),
    "SignRound": ({"method": "rtn"}, ptq.SignRound(), SIGNED),
}
SIZES = {"samples": 64, "windows": 8, "length": 512, "steps": 100, "blocks": 6}
QUICK = {"samples": 4, "windows": 2, "length": 64, "steps": 4, "blocks": 1}
LOSSES = re.compile(r"loss (\S+), trained (\S+),")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a checkpoint in safetensors, or id of the hub")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="text to measure on")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2], help="(default 3 2)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help="(default all)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"(default {size})")
    options = arguments(parser, "reconstruction")
    usual = QUICK if options.quick else SIZES
    sizes = {name: size if getattr(options, name) is None else getattr(options, name) for name, size in usual.items()}
    tokenizer = load_tokenizer(options.model)
    texts = {
        name: first_windows(find_text(file), tokenizer, sizes["length"], sizes[count])
        for name, file, count in (("calibration", options.calibration, "samples"), ("test", options.test, "windows"))
    }

    def measure(**about: Any) -> list[dict[str, Any]]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(compressed, options.model, texts, about).result()
        print(f"{about['bits']} bits, {about['variant']}: {found}", flush=True)
        return [found]

    digests = {f"{name}_digest": digest([text]) for name, text in texts.items()}
    common = {"model": Path(options.model).name, **sizes, **digests}
    wanted = [
        {**common, "bits": bits, "variant": variant}
        for bits, variant in itertools.product(options.bits, options.variants or VARIANTS)
    ]
    show(complete(options.rows, wanted, measure), options.rows)


def compressed(model_name: str, texts: dict[str, torch.Tensor], about: dict[str, Any]) -> dict[str, Any]:
    recipe, parametrization, engine = VARIANTS[about["variant"]]
    reconstruction = None
    if parametrization is not None:
        reconstruction = ptq.Reconstruction(parametrization, **{"steps": about["steps"], **engine})
    losses = _losses_of_log()
    started = time.perf_counter()
    result = ptq.compress(
        with_blocks(load(model_name), about["blocks"]),
        texts["calibration"],
        held_out=texts["test"],
        bits=about["bits"],
        group_size=64,
        symmetric=False,
        reconstruction=reconstruction,
        **recipe,
    )
    seconds = time.perf_counter() - started
    whole, original = load(model_name), load(model_name)
    install(whole, result.changes)
    assert result.quality is not None
    return {
        "divergence": divergence(whole, original, texts["test"]),
        "divergence_of_blocks": result.quality.kl_divergence,
        "perplexity": ptq.perplexity(whole, texts["test"]),
        "losses": losses,
        "seconds": seconds,
    }


def with_blocks(model: Any, count: int) -> Any:
    """The model without all blocks but the first; 0 for all of them."""
    _, blocks = find_blocks(model)
    if count:
        del blocks[count:]
        model.config.num_hidden_layers = count
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:count]
    return model


def _losses_of_log() -> list[tuple[float, float]]:
    """A list that gets the losses of each block, before and after its training, as the library logs them."""
    found: list[tuple[float, float]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            losses = LOSSES.search(record.getMessage())
            if losses:
                found.append((float(losses[1]), float(losses[2])))

    logger = logging.getLogger("opt8bit.ptq.pipeline")
    logger.setLevel(logging.INFO)
    logger.addHandler(Handler())
    return found


def show(rows: list[dict[str, Any]], path: Path) -> None:
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    for bits in widths:
        quality = f"{'KL':>9}{'of blocks':>11}{'perplexity':>12}"
        print(f"\n{f'{bits} bits':<40}{quality}{'loss, of the start':>20}{'seconds':>9}")
        for row in (row for row in rows if row["bits"] == bits):
            ratios = [after / before for before, after in row["losses"]]
            ratio = f"{statistics.geometric_mean(ratios):.3f}" if ratios else ""
            quality = f"{row['divergence']:>9.4f}{row['divergence_of_blocks']:>11.4f}{row['perplexity']:>12.2f}"
            print(f"{row['variant']:<40}{quality}{ratio:>20}{row['seconds']:>9.0f}")
    with plot(path, len(widths), height=4) as axes:
        for axis, bits in zip(axes, widths, strict=False):
            mine = [row for row in rows if row["bits"] == bits]
            axis.barh([row["variant"] for row in mine], [row["divergence"] for row in mine])
            axis.invert_yaxis()
            axis.set_title(f"{bits} bits: KL divergence, nats a token")


if __name__ == "__main__":
    main()
