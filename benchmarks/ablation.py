"""What does each part of the method buy: dynamic codes, blocks, StableEmbedding?

    pip install ".[demo]" && python benchmarks/ablation.py

Table 3 of *8-bit Optimizers via Block-wise Quantization* at a size that two cores can train: a GPT over words of the
standard library's source, with each combination of

- states of 32 bits, or of 8 by linear or dynamic codes, with one scale for the whole tensor, for each 256 elements one
  after another as in the paper, or for each row, which is how this package cuts matrices as narrow as most here;
- ``nn.Embedding`` or ``StableEmbedding``, whose own states have 32 bits;
- learning rates, which a tenth of the steps warms up to, and betas, without clipping of gradients, two seeds each.

At the first of those rates and betas, one moment at a time is rounded, too: which of them needs what.

The states are rounded behind each step of torch.optim.AdamW, all by the same quantizer, so that nothing but the codes
differs. A run is unstable where its loss is once not finite or above HOPELESS nats, which ends it, or is in the mean
of its last tenth above that of some earlier tenth by more than HARM nats. The final loss is the mean over the last
tenth of the steps.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import re
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from measuring import arguments, complete, plot
from torch import Tensor, nn

import opt8bit
from opt8bit.cli import demo
from opt8bit.cli.demo_settings import DemoSettings
from opt8bit.quant import dequantize_blockwise, dynamic_map, linear_map, quantize_blockwise

BLOCKS = ("whole tensor", "blocks of 256", "rows")
HARM = 0.3
HOPELESS = 100.0  # nats; a run that gets there is not gone on with
CODEBOOKS = {  # by whether they are signed
    "linear": {True: linear_map(), False: linear_map(signed=False)},
    "dynamic": {True: dynamic_map(), False: dynamic_map(signed=False)},
}
SIZE = DemoSettings(steps=250, width=64, heads=2, layers=2, context=64, batch=8)
QUICK = DemoSettings(steps=10, width=32, heads=2, layers=1, context=64, batch=8)
WORD = re.compile(rb"\w+|\W")


class Variant(NamedTuple):
    """How states are stored."""

    codes: str  # "linear" or "dynamic"; "" for 32 bits
    blocks: str = ""  # of BLOCKS
    moments: str = "both"  # that have 8 bits: or "first", or "second"

    @property
    def name(self) -> str:
        return f"{self.codes}, {self.blocks}" if self.codes else "32 bits"


VARIANTS = [Variant(""), *(Variant(*pair) for pair in itertools.product(CODEBOOKS, BLOCKS))]


class RoundedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose states are, after each step, what their 8-bit codes say."""

    def __init__(self, params: Iterable[nn.Parameter], variant: Variant, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self.variant = variant

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = super().step(closure)
        for param, state in self.state.items():
            if self.variant.codes and param.dim() > 1 and getattr(param, "state_bits", 8) == 8:
                for moment, name, signed in (("first", "exp_avg", True), ("second", "exp_avg_sq", False)):
                    if self.variant.moments in ("both", moment):
                        state[name].copy_(self._rounded(state[name], signed))
        return loss

    def _rounded(self, state: Tensor, signed: bool) -> Tensor:
        codebook = CODEBOOKS[self.variant.codes][signed]
        rows = state if self.variant.blocks == "rows" else state.view(1, -1)
        block_size = rows.shape[1] if self.variant.blocks == "whole tensor" else 256
        codes, absmax = quantize_blockwise(rows, codebook, block_size)
        return dequantize_blockwise(codes, absmax, codebook, block_size).view_as(state)


class WordGPT(nn.Module):
    def __init__(self, vocabulary: int, size: DemoSettings, embedding: type[nn.Embedding]) -> None:
        super().__init__()
        self.tokens = embedding(vocabulary, size.width)
        self.positions = nn.Parameter(torch.randn(size.context, size.width) * 0.02)
        self.blocks = nn.Sequential(*(demo.Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, context) -> (batch, context, vocabulary)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))


def words(vocabulary: int) -> Tensor:
    """The standard library's source as numbers of words, the rarest of which share the last number."""
    found = WORD.findall(demo.standard_library_text())
    most = [word for word, _ in collections.Counter(found).most_common(vocabulary - 1)]
    numbers = {word: number for number, word in enumerate(most)}
    return torch.tensor([numbers.get(word, vocabulary - 1) for word in found])


def train(
    data: Tensor,
    vocabulary: int,
    size: DemoSettings,
    variant: Variant,
    *,
    stable: bool,
    lr: float,
    beta2: float,
    seed: int,
) -> list[float]:
    """The loss of each step, in nats per word, up to one that is hopeless or not finite."""
    torch.manual_seed(seed)
    model = WordGPT(vocabulary, size, opt8bit.StableEmbedding if stable else nn.Embedding)
    optimizer = RoundedAdamW(model.parameters(), variant, lr=lr, betas=(0.9, beta2), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(size.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (size.steps / 10))
        loss = demo.batch_loss(model, data, size, generator)
        losses.append(loss.item())
        if not losses[-1] < HOPELESS:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def verdict(losses: list[float]) -> dict[str, Any]:
    tenth = max(1, len(losses) // 10)
    means = [statistics.mean(losses[start : start + tenth]) for start in range(0, len(losses) - tenth + 1, tenth)]
    has_ended_early = not losses[-1] < HOPELESS
    final = None if has_ended_early else statistics.mean(losses[-tenth:])
    return {"is_unstable": final is None or final > min(means) + HARM, "final_loss": final}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = arguments(parser, "ablation")
    vocabulary, size = (256, QUICK) if options.quick else (4096, SIZE)
    rates = (1e-2,) if options.quick else (1e-3, 4e-3, 1.6e-2)
    betas = (0.98,) if options.quick else (0.95, 0.999)
    seeds = (0,) if options.quick else (0, 1)
    data = words(vocabulary)
    variants = {variant.name: variant for variant in VARIANTS}

    def measure(
        states: str, moments: str, stable_embedding: bool, lr: float, beta2: float, seed: int
    ) -> list[dict[str, Any]]:
        variant = variants[states]._replace(moments=moments)
        losses = train(data, vocabulary, size, variant, stable=stable_embedding, lr=lr, beta2=beta2, seed=seed)
        found = verdict(losses)
        about = f"{states}, {moments}, stable {stable_embedding}, lr {lr}, beta2 {beta2}, seed {seed}"
        print(f"{about}: {found}", flush=True)
        return [found]

    wanted = [
        {"states": name, "moments": "both", "stable_embedding": stable, "lr": lr, "beta2": beta2, "seed": seed}
        for seed, lr, beta2, stable, name in itertools.product(seeds, rates, betas, (False, True), variants)
    ]
    first = {"stable_embedding": False, "lr": rates[0], "beta2": betas[0]}
    wanted_single = [
        {"states": name, "moments": moment, **first, "seed": seed}
        for seed, name, moment in itertools.product(seeds, list(variants)[1:], ("first", "second"))
    ]
    rows, single = complete(options.rows, wanted, measure), complete(options.rows, wanted_single, measure)
    print(f"\n{'8 bits for one moment':<24}{'moment':<18}{'unstable':>9}{'final loss: median':>20}")
    exact = [{**row, "moments": "none"} for row in rows if row["states"] == "32 bits" and first.items() <= row.items()]
    for name, moment in [("32 bits", "none"), *itertools.product(list(variants)[1:], ("first", "second"))]:
        mine = [row for row in exact + single if (row["states"], row["moments"]) == (name, moment)]
        share, median = statistics.mean(row["is_unstable"] for row in mine), statistics.median(finals(mine))
        print(f"{name:<24}{moment:<18}{share:>9.0%}{median:>20.3f}")
    show(rows, options)


def finals(rows: list[dict[str, Any]]) -> list[float]:
    return [math.inf if row["final_loss"] is None else row["final_loss"] for row in rows]


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"\n{'states':<24}{'embedding':<18}{'unstable':>9}{'final loss: median':>20}{'of the best':>13}")
    by_kind: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault((row["states"], row["stable_embedding"]), []).append(row)
    for (states, stable), mine in by_kind.items():
        share = statistics.mean(row["is_unstable"] for row in mine)
        embedding = "StableEmbedding" if stable else "nn.Embedding"
        print(
            f"{states:<24}{embedding:<18}{share:>9.0%}{statistics.median(finals(mine)):>20.3f}{min(finals(mine)):>13.3f}"
        )
    rates = sorted({row["lr"] for row in rows})
    with plot(options.rows, len(rates), height=4) as axes:
        for axis, lr in zip(axes, rates, strict=False):
            for stable, mark in ((False, "o"), (True, "s")):
                mine = [row for row in rows if row["lr"] == lr and row["stable_embedding"] == stable]
                there = [row for row in mine if row["final_loss"] is not None]
                label = "StableEmbedding" if stable else "nn.Embedding"
                axis.plot(
                    [row["final_loss"] for row in there], [row["states"] for row in there], mark, alpha=0.5, label=label
                )
            unstable = [row["states"] for row in rows if row["lr"] == lr and row["is_unstable"]]
            axis.plot([axis.get_xlim()[1]] * len(unstable), unstable, "rx", label="unstable")
            axis.set_title(f"learning rate {lr}")
            axis.set_xlabel("final loss, nats per word")
        for axis in axes[:1]:
            axis.legend()


if __name__ == "__main__":
    main()
