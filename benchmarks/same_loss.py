"""Do 8-bit states train to the same loss, with no hyper-parameter changed?

    pip install ".[bench,compress,demo]" && python benchmarks/same_loss.py [--task TASK ...] [--fashion FOLDER]

Table 1 of *8-bit Optimizers via Block-wise Quantization* at a size that two cores can train, three seeds each:

- ``gpt``: a byte-level GPT of 10 million parameters on the source of Python's standard library, AdamW; validation loss.
- ``images``: a ResNet of 0.2 million parameters on Fashion-MNIST, momentum; test accuracy.
- ``images-lion``: the same with Lion, whose 32-bit form is this package's own, as torch has none.

FOLDER has Fashion-MNIST's four ``*-ubyte.gz`` files (on Debian ``apt install dataset-fashion-mnist`` puts them into
``/usr/share/datasets/fashion-mnist``); without them both are left out. A row is written as soon as a training ends, and
a training that has a row is not repeated: start the command again where it was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from measuring import machine
from peers import Maker, bitsandbytes, imported, optimizers
from torch import Tensor, nn

import opt8bit
from opt8bit.cli import demo

SEEDS = (0, 1, 2)
FASHION = Path("/usr/share/datasets/fashion-mnist")


class Task(NamedTuple):
    name: str
    metric: str
    train: Callable[[Maker, int], float]  # (optimizer of parameters, seed) -> the metric
    makers: dict[str, Maker]  # the first is that with 32 bits


def train_gpt(make: Maker, seed: int, *, settings: demo.Settings) -> float:
    torch.manual_seed(seed)
    model = demo.GPT(settings)
    train, validation = demo.split(demo.load_text(None), settings)
    optimizer = make(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / settings.warmup))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        demo.batch_loss(model, train, settings, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
    generator = torch.Generator().manual_seed(0)  # the same batches for all
    with torch.no_grad():
        losses = [
            demo.batch_loss(model, validation, settings, generator).item() for _ in range(settings.final_eval_batches)
        ]
    return statistics.mean(losses)


class Residual(nn.Module):
    """Two convolutions beside the identity, or beside a convolution of one pixel where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        is_same = inputs == outputs and stride == 1
        self.beside = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inner + self.beside(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 32, 1),
        Residual(32, 64, 2),
        Residual(64, 96, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pixels (n, 1, 28, 28), float32 about zero, and classes."""

    def read(kind: str, header: int) -> Any:
        data = gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
        return numpy.frombuffer(data, numpy.uint8, offset=header).copy()

    pixels = torch.tensor(read("images-idx3", 16)).view(-1, 1, 28, 28).float()
    return (pixels - 73) / 90, torch.tensor(read("labels-idx1", 8)).long()


def train_resnet(make: Maker, seed: int, *, folder: Path, epochs: int, size: int | None, lr: float) -> float:
    x, y = images(folder, "train")
    x_test, y_test = images(folder, "t10k")
    x, y, x_test, y_test = x[:size], y[:size], x_test[:size], y_test[:size]
    torch.manual_seed(seed)
    model = resnet()
    optimizer = make(model.parameters(), lr=lr)
    steps = epochs * (len(x) // 128)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for batch in order[: len(x) // 128 * 128].split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            cosine.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x_test.split(500)])
    return float((found == y_test).float().mean() * 100)


def tasks(quick: bool, fashion: Path) -> list[Task]:
    big = demo.Settings(steps=400, lr=1e-3, width=320, heads=5, layers=8, warmup=40)
    small = demo.Settings(steps=3, width=64, layers=1, warmup=1, final_eval_batches=2)
    gpt = partial(train_gpt, settings=small if quick else big)
    adamw: dict[str, Maker] = {"torch.optim.AdamW": torch.optim.AdamW, "opt8bit.AdamW8bit": opt8bit.AdamW8bit}
    found = [Task("gpt", "validation loss, nats per byte", gpt, {**adamw, **optimizers("AdamW")})]
    if not (fashion / "train-images-idx3-ubyte.gz").is_file():
        print(f"{fashion} has no train-images-idx3-ubyte.gz: the tasks on images are left out")
        return found
    resnet = partial(train_resnet, folder=fashion, epochs=1 if quick else 2, size=1024 if quick else None)
    momentum: dict[str, Maker] = {
        "torch.optim.SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
        "opt8bit.SGD8bit": partial(opt8bit.SGD8bit, momentum=0.9, weight_decay=5e-4),
        **{name: partial(make, weight_decay=5e-4) for name, make in optimizers("SGD").items()},
    }
    lion: dict[str, Maker] = {
        "opt8bit.Lion8bit, 32-bit states": partial(opt8bit.Lion8bit, state_bits=32, weight_decay=0.1),
        "opt8bit.Lion8bit": partial(opt8bit.Lion8bit, weight_decay=0.1),
        **{name: partial(make, weight_decay=0.1) for name, make in optimizers("Lion").items()},
    }
    if bitsandbytes is not None:
        lion["bitsandbytes.Lion, 32-bit states"] = partial(bitsandbytes.optim.Lion, weight_decay=0.1)
    accuracy = "test accuracy, %"
    found.append(Task("images", accuracy, partial(resnet, lr=0.1), momentum))
    found.append(Task("images-lion", accuracy, partial(resnet, lr=3e-4), lion))
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(task: Task, seeds: tuple[int, ...], path: Path) -> None:
    """Trains what has no row yet; seed by seed, so that an early stop leaves comparable rows."""
    done = {(row["task"], row["optimizer"], row["seed"]) for row in read(path)}
    for seed in seeds:
        for name, make in task.makers.items():
            if (task.name, name, seed) in done:
                continue
            started = time.perf_counter()
            value = task.train(make, seed)
            about = {"task": task.name, "metric": task.metric, "optimizer": name, "seed": seed, "value": value}
            with path.open("a") as file:
                file.write(json.dumps({**about, "seconds": time.perf_counter() - started, **machine()}) + "\n")
            print(f"{task.name}, seed {seed}, {name}: {value:.4f} ({time.perf_counter() - started:.0f} s)", flush=True)


def show(rows: list[dict[str, Any]]) -> None:
    """Mean and spread; and whether the mean lies within the spread of 32-bit states."""
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        print(f"\n{task}: {mine[0]['metric']}")
        exact: list[float] = []
        for name in dict.fromkeys(row["optimizer"] for row in mine):
            values = [row["value"] for row in mine if row["optimizer"] == name]
            exact = exact or values
            mean = statistics.mean(values)
            verdict = "within the spread of 32 bits" if min(exact) <= mean <= max(exact) else ""
            print(f"  {name:<36}{mean:9.4f}  {min(values):9.4f} to {max(values):9.4f}  {len(values)} seeds  {verdict}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    pyplot: Any = imported("matplotlib.pyplot")
    names = list(dict.fromkeys(row["task"] for row in rows))
    if pyplot is None or not names:
        return
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 3), squeeze=False)
    for axis, task in zip(axes[0], names, strict=True):
        mine = [row for row in rows if row["task"] == task]
        axis.plot([row["value"] for row in mine], [row["optimizer"] for row in mine], "o", alpha=0.6)
        axis.set_title(task)
        axis.set_xlabel(mine[0]["metric"])
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and one seed, to see that it runs")
    parser.add_argument("--task", action="append", choices=("gpt", "images", "images-lion"), help="default: all")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder with Fashion-MNIST")
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/rows/same_loss.jsonl"), help="to add rows to")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/rows/same_loss.png"), help="where to save it")
    options = parser.parse_args()
    for task in tasks(options.quick, options.fashion):
        if options.task is None or task.name in options.task:
            run(task, SEEDS[:1] if options.quick else SEEDS, options.rows)
    rows = read(options.rows)
    show(rows)
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
