"""Where do 8-bit states stall? How far parameters move, against 32-bit states, where averages change slowly.

    python benchmarks/stall.py

A stored average moves only where a step changes it by half a gap of its codebook or more. Each row trains a 64x64
parameter on gradients of one kind, with SGD's momentum or AdamW's beta1 near 1, and compares how far the parameters
moved with 8-bit and with 32-bit states: the median over the elements of interest of moved (8 bits) / moved (32 bits).

- constant: each block's gradients are alike, up or down.
- mixed: as large as each other, with random signs.
- spread: constant in time, of normally distributed size.
- small: constant in time, a hundredth of the block's largest; the small ones are of interest.
- late: as small, but the small ones begin halfway, when the averages of the large ones have settled.
- alternating: up by 1.5, down by 0.5.
- noisy: a constant tenth beneath noise of size 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measuring import arguments, write_rows
from torch import Tensor, nn

import opt8bit

SHAPE = (64, 64)
Gradients = Iterator[Tensor]


def constant(steps: int) -> Gradients:
    yield from [torch.ones(SHAPE)] * steps


def mixed(steps: int) -> Gradients:
    yield from [torch.randn(SHAPE).sign()] * steps


def spread(steps: int) -> Gradients:
    yield from [torch.randn(SHAPE)] * steps


def small(steps: int) -> Gradients:
    grad = torch.full(SHAPE, 0.01)
    grad[:, 0] = 1
    yield from [grad] * steps


def late(steps: int) -> Gradients:
    first = torch.zeros(SHAPE)
    first[:, 0] = 1
    yield from [first] * (steps // 2)
    yield from small(steps - steps // 2)


def alternating(steps: int) -> Gradients:
    for step in range(steps):
        yield torch.full(SHAPE, -0.5 if step % 2 else 1.5)


def noisy(steps: int) -> Gradients:
    for _ in range(steps):
        yield 0.1 + torch.randn(SHAPE)


KINDS: dict[str, Callable[[int], Gradients]] = {
    kind.__name__: kind for kind in (constant, mixed, spread, small, late, alternating, noisy)
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **{f"SGD, momentum {m}": partial(opt8bit.SGD8bit, momentum=m) for m in (0.9, 0.99, 0.999)},
    **{
        f"AdamW, beta1 {beta}": partial(opt8bit.AdamW8bit, betas=(beta, 0.999), weight_decay=0.0)
        for beta in (0.9, 0.99, 0.999, 0.9999)
    },
    "AdEMAMix": partial(opt8bit.AdEMAMix8bit, weight_decay=0.0),
}


def moved(make: Callable[..., torch.optim.Optimizer], kind: str, steps: int, bits: int) -> Tensor:
    """Returns by how much training has moved each element of a parameter that begins at zero."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(SHAPE))
    optimizer = make([param], lr=1e-3, state_bits=bits)
    for grad in KINDS[kind](steps):
        param.grad = grad
        optimizer.step()
    return param.detach()


def measure(name: str, kind: str, steps: int) -> dict[str, Any]:
    ours, exact = (moved(OPTIMIZERS[name], kind, steps, bits)[:, 1:].double() for bits in (8, 32))
    ratio = ours / exact
    return {
        "optimizer": name,
        "gradients": kind,
        "steps": steps,
        "median_ratio": ratio.median().item(),
        "relative_error": ((ours - exact).norm() / exact.norm()).item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="(default 5000)")
    options = arguments(parser, "stall")
    steps = 20 if options.quick else options.steps
    print(f"\nmoved with 8-bit states / with 32-bit states, {steps} steps (relative error)")
    print(f"{'':<22}" + "".join(f"{kind:>18}" for kind in KINDS))
    rows = []
    for name in OPTIMIZERS:
        found = [measure(name, kind, steps) for kind in KINDS]
        rows += found
        cells = [f"{row['median_ratio']:.3f} ({row['relative_error']:.1%})" for row in found]
        print(f"{name:<22}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    write_rows(options.rows, rows)


if __name__ == "__main__":
    main()
