"""How long does an optimizer step take on the CPU, against torch and the other 8-bit optimizers?

    pip install ".[bench]" && python benchmarks/cpu_step.py

Each question alternates all optimizers in one process, round by round, on their own copies of the same float32
parameters and gradients, and reports medians and ratios of medians to torch's fused optimizer. Peers that are not
installed are left out. Writes one JSON line per row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import compare, main, parameters
from peers import optimizers
from torch import nn

import opt8bit

Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
GPT2_SMALL = [
    (50257, 768),
    (1024, 768),
    *[
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    * 12,
    (768,),
    (768,),
]


def questions(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    """Parameter shapes, by name."""
    if quick:
        return {"one 256x256": [(256, 256)], "20 of 64x64": [(64, 64)] * 20}
    return {
        "one 4096x4096": [(4096, 4096)],
        "GPT-2 small": GPT2_SMALL,
        "1,000 of 64x64": [(64, 64)] * 1000,
    }


def adamw_peers() -> dict[str, Maker]:
    peers: dict[str, Maker] = {
        "torch.optim.AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        "opt8bit.AdamW8bit": lambda params: opt8bit.AdamW8bit(params, lr=1e-3),
        "torch.optim.AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    }
    for name, make in optimizers("AdamW").items():
        peers[name] = partial(make, lr=1e-3)
    return peers


def sgd_peers() -> dict[str, Maker]:
    return {
        "torch.optim.SGD fused": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
        "opt8bit.SGD8bit": lambda params: opt8bit.SGD8bit(params, lr=1e-3, momentum=0.9),
    }


def measure(rounds: int, quick: bool) -> list[dict[str, Any]]:
    asked = [(f"AdamW, {name}", shapes, adamw_peers()) for name, shapes in questions(quick).items()]
    asked.append(("SGD with momentum, " + asked[0][0].split(", ")[1], asked[0][1], sgd_peers()))
    rows = []
    for question, shapes, peers in asked:
        rows += compare(question, {name: make(parameters(shapes)) for name, make in peers.items()}, rounds)
    return rows


if __name__ == "__main__":
    main(__doc__, "cpu_step.jsonl", measure)
