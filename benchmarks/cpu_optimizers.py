"""How long does a step of each optimizer take on the CPU, against torch's fastest of the same rule?

    pip install ".[bench]" && python benchmarks/cpu_optimizers.py [--only QUESTION ...]

One parameter of 4096x4096 where a question does not name others, in the dtype that is asked for; each question
alternates its optimizers in one process, round by round, on their own copies, and reports medians and ratios of medians
to the first one. That is torch's fused optimizer, its foreach one where there is no fused one, its only one for Muon,
and torch's fused AdamW, for scale, where torch has no such rule. Every rule of the package is asked about, some of them
with more than one question. bitsandbytes stands beside the rules that it has, for float32, where it is installed.
Questions that have rows are not asked again.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import arguments, compare, complete, parameters, plot
from peers import Maker, bitsandbytes

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.every import OPTIMIZERS

Shapes = Sequence[tuple[int, int]]
GPT2_MATRICES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


class Question(NamedTuple):
    name: str
    base: tuple[str, Maker]
    ours: Maker
    bitsandbytes: str | None = None  # its 8-bit class
    dtype: torch.dtype = torch.float32
    shapes: Shapes = ((4096, 4096),)


ADAMW = ("torch.optim.AdamW fused", partial(torch.optim.AdamW, fused=True))
MUON = ("torch.optim.Muon", torch.optim.Muon)
SPECIAL = [
    Question(
        "AdamW, amsgrad",
        ("torch.optim.AdamW fused", partial(torch.optim.AdamW, fused=True, amsgrad=True)),
        partial(opt8bit.AdamW8bit, amsgrad=True),
    ),
    Question(
        "RMSprop, centered, momentum",
        ("torch.optim.RMSprop foreach", partial(torch.optim.RMSprop, foreach=True, centered=True, momentum=0.9)),
        partial(opt8bit.RMSprop8bit, centered=True, momentum=0.9),
    ),
    Question("Muon, 1024x1024", MUON, opt8bit.Muon8bit, shapes=[(1024, 1024)]),
    Question("Muon, 12 of 1024x1024", MUON, opt8bit.Muon8bit, shapes=[(1024, 1024)] * 12),
    Question("Muon, matrices of GPT-2 small", MUON, opt8bit.Muon8bit, shapes=GPT2_MATRICES),
    Question("AdamW, bfloat16", ADAMW, opt8bit.AdamW8bit, dtype=torch.bfloat16),
    Question(
        "AdamW, bfloat16, stochastic rounding",
        ADAMW,
        partial(opt8bit.AdamW8bit, stochastic_rounding=True),
        dtype=torch.bfloat16,
    ),
    Question(
        "AdamW, bfloat16, compensation", ADAMW, partial(opt8bit.AdamW8bit, compensation=True), dtype=torch.bfloat16
    ),
    Question("AdamW, float16", ADAMW, opt8bit.AdamW8bit, dtype=torch.float16),
]


def question_of(ours: type[Optimizer8bit]) -> Question:
    """The question about an optimizer's defaults, against torch's fastest of the same rule."""
    hyper = {"momentum": 0.9} if ours is opt8bit.SGD8bit else {}  # it has no states otherwise
    theirs = getattr(torch.optim, ours.counterpart or "AdamW")
    found = inspect.signature(theirs).parameters
    way = next((way for way in ("fused", "foreach") if way in found), "")
    base = partial(theirs, **hyper, **({way: True} if way else {}))
    name = ours.__name__
    known = name if hasattr(getattr(bitsandbytes, "optim", None), name) else None
    title = ", ".join([name.removesuffix("8bit"), *hyper])
    return Question(title, (f"torch.optim.{theirs.__name__} {way}".strip(), base), partial(ours, **hyper), known)


# MuonAdamW8bit takes names, and its steps are Muon's and AdamW's.
QUESTIONS = [*map(question_of, (each for each in OPTIMIZERS if each is not opt8bit.MuonAdamW8bit)), *SPECIAL]


def optimizers_of(question: Question, shapes: Shapes) -> dict[str, torch.optim.Optimizer]:
    makers: dict[str, Maker] = {question.base[0]: question.base[1]}
    makers["opt8bit." + getattr(question.ours, "func", question.ours).__name__] = question.ours
    if bitsandbytes is not None and question.bitsandbytes:
        momentum = {"momentum": 0.9} if question.bitsandbytes in ("SGD8bit", "LARS8bit") else {}
        makers[f"bitsandbytes.{question.bitsandbytes}"] = partial(
            getattr(bitsandbytes.optim, question.bitsandbytes), **momentum
        )
    made = {name: make(parameters(shapes, question.dtype), lr=1e-3) for name, make in makers.items()}
    for optimizer in made.values():
        if isinstance(optimizer, opt8bit.AdamWScheduleFree8bit):
            optimizer.train()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="times that each optimizer steps (default 31)")
    parser.add_argument("--only", nargs="+", metavar="QUESTION", help="by their names (default all)")
    options = arguments(parser, "cpu_optimizers")
    questions = {
        question.name: question for question in QUESTIONS if question.name in (options.only or [question.name])
    }

    def measure(question: str) -> list[dict[str, Any]]:
        print(f"\n{question}")
        shapes = [(256, 256)] if options.quick else questions[question].shapes
        return compare(optimizers_of(questions[question], shapes), 3 if options.quick else options.rounds)

    rows = complete(options.rows, [{"question": name} for name in questions], measure)
    print(f"\n{'':<40}{'first':<30}{'ms':>9}{'ours':>9}{'ratio':>8}")
    for name in questions:
        first, ours, *_ = [row for row in rows if row["question"] == name]
        times = f"{first['median_ms']:>9.2f}{ours['median_ms']:>9.2f}{ours['ratio']:>7.2f}x"
        print(f"{name:<40}{first['optimizer']:<30}{times}")
    draw(rows, options.rows)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to the first optimizer of each question."""
    ours = [row for row in rows if row["optimizer"].startswith("opt8bit.")]
    with plot(path, 1, width=6, height=5) as axes:
        for axis in axes:
            axis.barh([row["question"] for row in ours], [row["ratio"] for row in ours])
            axis.axvline(1, color="black")
            axis.invert_yaxis()
            axis.set_xlabel("time / torch's")


if __name__ == "__main__":
    main()
