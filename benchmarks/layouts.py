"""How long does a step take where parameters have another memory format, or a group each?

    python benchmarks/layouts.py [--threads 1 2] [--dtypes float32 bfloat16]

- ResNet-50: its parameters and gradients, contiguous and ``torch.channels_last``.
- 150 groups: a 64x64 tensor in each, with a learning rate of its own, as layer-wise decay has it.

torch's fused AdamW and AdamW8bit alternate in one process, round by round, on both formats. A row has the medians, and
what AdamW8bit takes of torch's on the same, and of its own on contiguous parameters.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import alternate, arguments, complete, parameters, seconds
from torch import nn

import opt8bit

Shapes = list[tuple[int, ...]]
GROUPS, RATE = 150, 1e-3


def resnet50() -> Shapes:
    """Of its convolutions, of its BatchNorms, and of its classifier."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(width,)] * 4 + [(4 * width,)] * 2
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def channels_last(params: list[nn.Parameter]) -> list[nn.Parameter]:
    for param in params:
        if param.dim() == 4:
            grad = param.grad
            assert grad is not None
            param.data = param.data.contiguous(memory_format=torch.channels_last)
            param.grad = grad.contiguous(memory_format=torch.channels_last)
    return params


def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [param], "lr": RATE * 0.99**number} for number, param in enumerate(params)]


def questions(quick: bool) -> dict[str, dict[str, tuple[Shapes, Any]]]:
    """Shapes, and what becomes of the parameters, by the name of the format, by the name of the question."""
    small: Shapes = [(64, 64)] * (3 if quick else GROUPS)
    convolutions: Shapes = [(16, 16, 3, 3)] if quick else resnet50()
    return {
        "ResNet-50": {"contiguous": (convolutions, list), "channels_last": (convolutions, channels_last)},
        f"{GROUPS} groups": {"contiguous": (small, grouped)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="times that each optimizer steps (default 31)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    options = arguments(parser, "layouts")
    asked = questions(options.quick)
    makers: dict[str, Any] = {"torch": partial(torch.optim.AdamW, fused=True), "opt8bit": opt8bit.AdamW8bit}
    rounds = 3 if options.quick else options.rounds

    def measure(question: str, dtype: str, threads: int) -> list[dict[str, Any]]:
        torch.set_num_threads(threads)
        clocks: dict[str, Callable[[], float]] = {}
        for name, (shapes, become) in asked[question].items():
            for package, maker in makers.items():
                optimizer = maker(become(parameters(shapes, getattr(torch, dtype))), lr=RATE)
                clocks[f"{package}, {name}"] = partial(seconds, optimizer.step)
        medians = {key: statistics.median(times) for key, times in alternate(clocks, rounds, rounds).items()}
        return [
            {
                "format": name,
                "torch_ms": 1e3 * medians[f"torch, {name}"],
                "opt8bit_ms": 1e3 * medians[f"opt8bit, {name}"],
                "of_torch": medians[f"opt8bit, {name}"] / medians[f"torch, {name}"],
                "of_contiguous": medians[f"opt8bit, {name}"] / medians["opt8bit, contiguous"],
            }
            for name in asked[question]
        ]

    wanted = [
        {"question": question, "dtype": dtype, "threads": threads}
        for threads, dtype, question in itertools.product(options.threads, options.dtypes, asked)
    ]
    rows = complete(options.rows, wanted, measure)
    print(f"{'':48}{'torch fused':>14}{'AdamW8bit':>14}{'of torch':>10}{'of contiguous':>15}")
    for row in rows:
        name = f"{row['question']}, {row['format']}, {row['dtype']}, {row['threads']} threads"
        print(
            f"{name:48}{row['torch_ms']:11.2f} ms{row['opt8bit_ms']:11.2f} ms"
            f"{row['of_torch']:10.2f}{row['of_contiguous']:15.2f}"
        )


if __name__ == "__main__":
    main()
