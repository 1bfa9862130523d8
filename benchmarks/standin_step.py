"""How much faster is a trainer's ``optimizer.step()`` on the CPU where the stand-in answers for bitsandbytes?

    pip install ".[bench]" && python benchmarks/standin_step.py

Classes of ``bitsandbytes.optim`` as bitsandbytes has them, and as ``opt8bit run`` puts them in their place. Each class
alternates both, round by round, on their own copies of the parameters and gradients of GPT-2 small in float32, and
reports medians and the ratio of medians. A class that has rows for this number of threads is not asked again.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from cpu_step import GPT2_SMALL
from measuring import arguments, compare, complete, parameters
from peers import bitsandbytes

from opt8bit.integrations.bitsandbytes import optim

MOMENTUM = {"momentum": 0.9}
CLASSES: dict[str, dict[str, float]] = {"AdamW8bit": {}, "Lion8bit": {}, "SGD8bit": MOMENTUM, "RMSprop8bit": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that each optimizer steps (default 7)")
    options = arguments(parser, "standin_step")
    if bitsandbytes is None:
        raise SystemExit("bitsandbytes is not installed: there is nothing to compare with")
    shapes = [(64, 64)] * 20 if options.quick else GPT2_SMALL

    def measure(question: str, threads: int) -> list[dict[str, Any]]:
        print(f"\n{question}, {threads} threads: {len(shapes)} tensors")
        made = {
            f"{where}.{question}": getattr(module, question)(parameters(shapes), lr=1e-3, **CLASSES[question])
            for where, module in (("bitsandbytes", bitsandbytes.optim), ("stand-in", optim))
        }
        return compare(made, 3 if options.quick else options.rounds)

    wanted = [{"question": name, "threads": torch.get_num_threads()} for name in CLASSES]
    rows = complete(options.rows, wanted, measure)
    print(f"\n{'':<14}{'bitsandbytes, ms':>18}{'stand-in, ms':>14}{'times as fast':>15}")
    for name in CLASSES:
        theirs, ours = (row["median_ms"] for row in rows if row["question"] == name)
        print(f"{name:<14}{theirs:>18.1f}{ours:>14.1f}{theirs / ours:>15.1f}")


if __name__ == "__main__":
    main()
