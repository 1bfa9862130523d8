"""How long does an optimizer step take on the CPU, against torch and the other 8-bit optimizers?

    pip install ".[bench,demo]"
    pip install --no-deps --target FORK bitsandbytes-cpu-fork
    python benchmarks/cpu_step.py [--fork FORK] [--threads 1 2] [--dtypes float32 bfloat16]

Tensors of 10^4 to 10^8 elements, the parameters of three models, and a thousand small tensors. Each question alternates
all optimizers, round by round, on their own copies of the same parameters and gradients, and reports medians and ratios
of medians to torch's fused optimizer. (Its states have the parameters' dtype; torchao's have 32 bits where the elements
are no multiple of 256.) Peers that are not installed are left out; bitsandbytes-cpu-fork, which cannot be imported
beside bitsandbytes, steps in a process of its own. Questions that have rows are not asked again.
"""

from __future__ import annotations

import argparse
import itertools
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, compare, complete, parameters, plot, print_ratios
from peers import Elsewhere, Maker, optimizers

import opt8bit

Shapes = list[tuple[int, ...]]


def transformer(width: int, inner: int, vocabulary: int, blocks: int, block: Shapes, others: Shapes) -> Shapes:
    """Of a block's matrices, the two of its MLP excepted, and of everything else."""
    return [(vocabulary, width), *others, *[*block, (inner, width), (width, inner)] * blocks]


GPT2_SMALL = transformer(
    768,
    3072,
    50257,
    12,
    [(2304, 768), (2304,), (768, 768), (3072,), *[(768,)] * 6],
    [(1024, 768), (768,), (768,)],
)
SMOLLM2 = transformer(
    576, 1536, 49152, 30, [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (576,), (576,)], [(576,)]
)
MINILM = transformer(
    384, 1536, 30522, 6, [*[(384, 384)] * 4, (1536,), *[(384,)] * 9], [(512, 384), (2, 384), (384,), (384,)]
)


def questions(quick: bool) -> dict[str, Shapes]:
    """Parameter shapes, by name."""
    if quick:
        return {"one of 10^4": [(100, 100)], "20 of 64x64": [(64, 64)] * 20}
    return {
        **{
            f"one of 10^{exponent}": [(10 ** (exponent // 2), 10 ** (exponent - exponent // 2))]
            for exponent in range(4, 9)
        },
        "one 4096x4096": [(4096, 4096)],
        "GPT-2 small": GPT2_SMALL,
        "SmolLM2-135M": SMOLLM2,
        "all-MiniLM-L6-v2": MINILM,
        "1,000 of 64x64": [(64, 64)] * 1000,
    }


def adamw_peers() -> dict[str, Maker]:
    makers: dict[str, Maker] = {
        "torch.optim.AdamW fused": partial(torch.optim.AdamW, fused=True),
        "opt8bit.AdamW8bit": opt8bit.AdamW8bit,
        "torch.optim.AdamW foreach": partial(torch.optim.AdamW, foreach=True),
        **optimizers("AdamW"),
    }
    return {name: partial(make, lr=1e-3) for name, make in makers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="times that each optimizer steps (default 31)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--fork", type=Path, help="folder where bitsandbytes-cpu-fork was installed")
    options = arguments(parser, "cpu_step")
    asked = questions(options.quick)

    def measure(question: str, dtype: str, threads: int) -> list[dict[str, Any]]:
        torch.set_num_threads(threads)
        shapes = asked[question]
        print(f"\n{question}, {dtype}, {threads} threads: {len(shapes)} tensors")
        made: dict[str, Any] = {
            name: make(parameters(shapes, getattr(torch, dtype))) for name, make in adamw_peers().items()
        }
        with ExitStack() as stack:
            if options.fork:
                worker = {"module": "bitsandbytes.optim", "class": "AdamW8bit", "shapes": shapes}
                fork = Elsewhere(options.fork, **worker, dtype=dtype, threads=threads)
                made["bitsandbytes-cpu-fork, AdamW8bit"] = stack.enter_context(closing(fork))
            return compare(made, 3 if options.quick else options.rounds)

    wanted = [
        {"question": question, "dtype": dtype, "threads": threads}
        for threads, dtype, question in itertools.product(options.threads, options.dtypes, asked)
    ]
    rows = complete(options.rows, wanted, measure)
    for threads, dtype in itertools.product(options.threads, options.dtypes):
        print_ratios(
            f"{dtype}, {threads} threads",
            [row for row in rows if (row["threads"], row["dtype"]) == (threads, dtype)],
        )
    draw(rows, options.rows)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to torch's fused optimizer, a panel for each dtype and number of threads."""
    kinds = list(dict.fromkeys((row["dtype"], row["threads"]) for row in rows))
    with plot(path, len(kinds), height=4.5) as axes:
        for axis, (dtype, threads) in zip(axes, kinds, strict=False):
            mine = [row for row in rows if (row["dtype"], row["threads"]) == (dtype, threads)]
            for name in dict.fromkeys(row["optimizer"] for row in mine):
                points = [(row["ratio"], row["question"]) for row in mine if row["optimizer"] == name]
                axis.semilogx(*zip(*points, strict=True), "o-", label=name)
            axis.set_title(f"{dtype}, {threads} threads: time / torch's fused")
        for axis in axes[:1]:
            axis.legend(fontsize="small")


if __name__ == "__main__":
    main()
