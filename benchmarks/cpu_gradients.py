"""What does a step cost on the CPU whose gradients are not as usual, against torch's fused AdamW?

    pip install ".[bench]"
    python benchmarks/cpu_gradients.py [--threads 1 2]

Gradients of another dtype than their parameter, as mixed precision leaves them: torch's fused AdamW, which does not
take them, steps with gradients of the parameter's dtype. And a thousand small tensors of which one has no gradient,
another one in each step, as experts without a token. Both optimizers alternate, round by round, on their own copies of
the same parameters; reported are medians and their ratios. Questions that have rows are not asked again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import arguments, compare, complete, parameters, print_ratios
from torch import nn

import opt8bit

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW fused": partial(torch.optim.AdamW, fused=True, lr=1e-3),
    "opt8bit.AdamW8bit": partial(opt8bit.AdamW8bit, lr=1e-3),
}
DTYPES = {
    "float32, gradients in bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16, gradients in float32": (torch.bfloat16, torch.float32),
}
ABSENT = "1,000 of 64x64, one without a gradient"


class WithAbsent:
    """An optimizer that steps without the gradient of one parameter, another one each time."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        self.optimizer, self.params = optimizer, params
        self.order = itertools.cycle(range(0, 7 * len(params), 7))

    def step(self) -> None:
        param = self.params[next(self.order) % len(self.params)]
        grad, param.grad = param.grad, None
        self.optimizer.step()
        param.grad = grad


def with_gradients_in(dtype: torch.dtype, params: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters with the same gradients in a dtype."""
    for param in params:
        grad = param.grad
        assert grad is not None
        param.grad_dtype = None
        param.grad = grad.to(dtype)
    return params


def made(question: str, size: int, count: int) -> dict[str, Any]:
    """Each optimizer with its own parameters."""
    if question == ABSENT:
        shapes = [(64, 64)] * count
        both = {name: parameters(shapes, torch.float32) for name in MAKERS}
        return {name: WithAbsent(MAKERS[name](params), params) for name, params in both.items()}
    dtype, grad_dtype = DTYPES[question]
    both = {name: parameters([(size, size)], dtype) for name in MAKERS}
    with_gradients_in(grad_dtype, both["opt8bit.AdamW8bit"])
    return {name: MAKERS[name](params) for name, params in both.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="times that each optimizer steps (default 31)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    options = arguments(parser, "cpu_gradients")
    size, count, rounds = (64, 10, 3) if options.quick else (2048, 1000, options.rounds)

    def measure(question: str, threads: int) -> list[dict[str, Any]]:
        torch.set_num_threads(threads)
        return compare(made(question, size, count), rounds)

    wanted = [
        {"question": question, "threads": threads}
        for threads, question in itertools.product(options.threads, [*DTYPES, ABSENT])
    ]
    rows = complete(options.rows, wanted, measure)
    for threads in options.threads:
        print_ratios(f"{threads} threads", [row for row in rows if row["threads"] == threads])


if __name__ == "__main__":
    main()
