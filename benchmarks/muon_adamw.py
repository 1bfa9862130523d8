"""Does one optimizer with 8-bit states train to the loss of torch's Muon and AdamW side by side?

    pip install ".[bench]" && python benchmarks/muon_adamw.py

The demo's byte-level GPT on the source of Python's standard library, 60 steps, three seeds. Muon steps the matrices of
the blocks and AdamW all else, at one learning rate (``match_rms_adamw``) that warms up and falls linearly. All train
the same weights on the same batches. To tell what 8 bits change from what else differs from torch's, ours trains with
32 bits for Muon's momentum, for AdamW's moments, and for both, too. Besides the validation loss: the bytes of the
states, and the median time of an optimizer step. A training that has a row is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from measuring import arguments, complete
from torch import nn

import opt8bit
from opt8bit.cli import demo
from opt8bit.cli.demo_settings import DemoSettings

SEEDS = (0, 1, 2)
QUICK = DemoSettings(steps=3, width=64, layers=1, warmup=1, eval_batches=2)
Optimizers = Sequence[torch.optim.Optimizer]


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """What Muon steps."""
    return [param for name, param in model.named_parameters() if name.startswith("blocks.") and param.dim() == 2]


def torchs(model: nn.Module, **hyper: Any) -> Optimizers:
    matrices = matrices_of(model)
    chosen = set(matrices)
    others = [param for param in model.parameters() if param not in chosen]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **hyper)
    return muon, torch.optim.AdamW(others, **hyper)


def ours(model: nn.Module, muon_bits: int = 8, adamw_bits: int = 8, **hyper: Any) -> Optimizers:
    for param in matrices_of(model):
        param.state_bits = muon_bits  # type: ignore[attr-defined]
    return [opt8bit.MuonAdamW8bit(model, state_bits=adamw_bits, **hyper)]


MAKERS: dict[str, Callable[..., Optimizers]] = {
    "torch.optim.Muon and AdamW": torchs,
    "opt8bit.MuonAdamW8bit": ours,
    "... 32 bits for Muon": partial(ours, muon_bits=32),
    "... 32 bits for AdamW": partial(ours, adamw_bits=32),
    "... 32 bits for both": partial(ours, muon_bits=32, adamw_bits=32),
}


def train(make: Callable[..., Optimizers], seed: int, settings: DemoSettings) -> dict[str, float]:
    """Returns the validation loss in nats per byte, the bytes of states, and the median seconds of a step."""
    torch.manual_seed(seed)
    model = demo.GPT(settings)
    text, validation = demo.split(demo.load_text(None), settings)
    optimizers = make(model, lr=settings.lr, weight_decay=settings.weight_decay)

    def factor(step: int) -> float:
        return min((step + 1) / settings.warmup, (settings.steps - step) / settings.steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    generator, seconds = torch.Generator().manual_seed(seed), []
    for _ in range(settings.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        demo.batch_loss(model, text, settings, generator).backward()
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        seconds.append(time.perf_counter() - start)
        for schedule in schedules:
            schedule.step()
    return {
        "value": demo.validation_loss(model, validation, settings),
        "state_bytes": sum(map(demo.state_bytes, optimizers)),
        "step_ms": statistics.median(seconds) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = arguments(parser, "muon_adamw")
    settings = QUICK if options.quick else DemoSettings(steps=60)

    def measure(optimizer: str, seed: int) -> list[dict[str, Any]]:
        return [train(MAKERS[optimizer], seed, settings)]

    wanted = [{"optimizer": name, "seed": seed} for seed in SEEDS for name in MAKERS]
    rows = complete(options.rows, wanted, measure)
    print(f"\n{'':<28}{'loss':>8}  {'least to largest':<20}{'states, MB':>10}{'step, ms':>10}")
    for name in MAKERS:
        mine = [row for row in rows if row["optimizer"] == name]
        losses = [row["value"] for row in mine]
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        sizes = f"{mine[0]['state_bytes'] / 1e6:>10.2f}{statistics.median(row['step_ms'] for row in mine):>10.2f}"
        print(f"{name:<28}{statistics.mean(losses):>8.4f}  {spread:<20}{sizes}")


if __name__ == "__main__":
    main()
