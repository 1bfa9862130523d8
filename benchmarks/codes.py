"""How exact are 8-bit codes, and does a parameter without gradient stay where it is?

    pip install ".[bench,demo]" && python benchmarks/codes.py

Numbers of known distributions, and both moments of Adam as the GPT of ``same_loss.py --task gpt`` ends with them, are
coded and decoded block by block, by this package and by others. Printed is the norm of the error relative to that of
the numbers, and the mean of each number's own relative error. All use the 8-bit dynamic map; the last column is how
many of a hundred exact zeros, strewn in, are zero afterwards. The second table is of a parameter half of whose
gradients are zero always: how far those elements have moved after 1,000 steps of AdamW without weight decay. The third
is of an element that has a gradient once, smaller than the others' of its block, and none in the next four steps.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, complete, plot
from peers import Maker, Quantizer, adamw, quantizers
from torch import Tensor, nn
from training_tasks import GPT_10M, GPT_QUICK, trained_gpt

from opt8bit.cli.demo_settings import DemoSettings
from opt8bit.quant import dequantize_blockwise, dynamic_map, quantize_blockwise

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)
RARE = (1e-3, 3e-4, 1e-4, 1e-5)  # gradients, where the others' are 1
ZEROS = 100
MOMENTS = {"Adam's first moment": ("exp_avg", True), "Adam's second moment": ("exp_avg_sq", False)}


def by_opt8bit(x: Tensor, block_size: int, signed: bool) -> Tensor:
    codebook = dynamic_map(signed)
    rows = x.view(1, -1)
    return dequantize_blockwise(*quantize_blockwise(rows, codebook, block_size), codebook, block_size).view(-1)


def distributions(count: int) -> dict[str, tuple[Tensor, bool]]:
    """Numbers, and whether they can be negative."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return {
        "normal": (normal, True),
        "chi-square, 1 degree": (normal.square(), False),
        "log-normal": (normal.exp(), False),
    }


def moments(settings: DemoSettings) -> dict[str, tuple[Tensor, bool]]:
    """Of the matrices of a GPT trained by torch.optim.AdamW, in the order of its parameters."""
    model, optimizer = trained_gpt(torch.optim.AdamW, 0, settings)
    matrices = [param for param in model.parameters() if param.dim() == 2]
    found = {}
    for label, (name, signed) in MOMENTS.items():
        state = torch.cat([optimizer.state[param][name].flatten() for param in matrices])
        found[label] = (state[: len(state) // max(BLOCK_SIZES) * max(BLOCK_SIZES)], signed)
    return found


def errors(x: Tensor, coded: Tensor) -> dict[str, float]:
    is_there = x != 0
    difference = (coded - x).double()
    return {
        "norm": float(difference.norm() / x.double().norm()),
        "mean": float((difference.abs() / x.abs().double())[is_there].mean()),
    }


def zeros_kept(quantize: Quantizer, x: Tensor, block_size: int, signed: bool) -> int:
    places = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:ZEROS]
    with_zeros = x.clone()
    with_zeros[places] = 0
    return int((quantize(with_zeros, block_size, signed)[places] == 0).sum())


def drift(make: Maker, steps: int) -> float:
    """The largest change of an element without gradient, in units of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(64, 1024))
    optimizer = make([param], lr=1.0, weight_decay=0.0)
    for _ in range(steps):
        param.grad = torch.randn(param.shape, generator=generator)
        param.grad[:, ::2] = 0
        optimizer.step()
    return float(param.detach()[:, ::2].abs().max())


def rare(make: Maker, size: float) -> float:
    """The change of an element whose gradient was that at the first of five steps, in units of the learning rate."""
    param = nn.Parameter(torch.zeros(64, 256))
    optimizer = make([param], lr=1.0, weight_decay=0.0)
    for step in range(5):
        param.grad = torch.ones(param.shape)
        param.grad[0, 0] = 0 if step else size
        optimizer.step()
    return abs(float(param.detach()[0, 0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = arguments(parser, "codes")
    makers = adamw()
    others = {name: make for name, make in makers.items() if name != "torch.optim.AdamW"}
    coders: dict[str, Quantizer] = {"opt8bit": by_opt8bit, **quantizers()}
    count, drift_steps = (2**14, 20) if options.quick else (2**22, 1000)
    known = distributions(count)
    trained = cache(partial(moments, GPT_QUICK if options.quick else GPT_10M))

    def code(data: str, block_size: int, **_: Any) -> list[dict[str, Any]]:
        x, signed = known[data] if data in known else trained()[data]
        print(f"{data}, {len(x):,} numbers in blocks of {block_size}", flush=True)
        return [
            {
                "by": name,
                **errors(x, quantize(x, block_size, signed)),
                "zeros_kept": zeros_kept(quantize, x, block_size, signed),
            }
            for name, quantize in coders.items()
        ]

    def move(steps: int, **_: Any) -> list[dict[str, Any]]:
        return [{"by": name, "moved": drift(make, steps)} for name, make in others.items()]

    def move_once(size: float, **_: Any) -> list[dict[str, Any]]:
        return [{"by": name, "moved": rare(make, size)} for name, make in makers.items()]

    blocks = [
        {"question": "codes", "data": data, "block_size": size} for data in (*known, *MOMENTS) for size in BLOCK_SIZES
    ]
    coded = complete(options.rows, blocks, code)
    moved = complete(options.rows, [{"question": "drift", "steps": drift_steps}], move)
    moved_once = complete(options.rows, [{"question": "rare", "size": size} for size in RARE], move_once)
    show(coded, moved, moved_once)
    draw(coded, options.rows)


def show(coded: list[dict[str, Any]], moved: list[dict[str, Any]], moved_once: list[dict[str, Any]]) -> None:
    print(f"\n{'':<24}{'block':>6}  {'by':<14}{'norm':>9}{'mean':>12}{'zeros kept':>12}")
    for row in coded:
        place = f"{row['data']:<24}{row['block_size']:>6}  {row['by']:<14}"
        print(f"{place}{row['norm']:>9.5f}{row['mean']:>12.4f}{row['zeros_kept']:>12}")
    print("\nelements without gradient have moved, at most, in learning rates")
    for row in moved:
        print(f"  {row['by']:<24}{row['moved']:10.3f}")
    print("\nan element with a gradient once, that times its block's, has moved by, in learning rates")
    print(f"  {'':<24}" + "".join(f"{size:>12g}" for size in RARE))
    for name in dict.fromkeys(row["by"] for row in moved_once):
        mine = {row["size"]: row["moved"] for row in moved_once if row["by"] == name}
        print(f"  {name:<24}" + "".join(f"{mine[size]:>12,.2f}" for size in RARE))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The mean relative error by block size, a panel for each kind of data."""
    labels = list(dict.fromkeys(row["data"] for row in rows))
    with plot(path, len(labels), width=4) as axes:
        for axis, label in zip(axes, labels, strict=False):
            for name in dict.fromkeys(row["by"] for row in rows):
                mine = [row for row in rows if row["by"] == name and row["data"] == label]
                axis.loglog([row["block_size"] for row in mine], [row["mean"] for row in mine], "o-", label=name)
            axis.set_title(label)
            axis.set_xlabel("block size")
        for axis in axes[:1]:
            axis.set_ylabel("mean relative error")
            axis.legend()


if __name__ == "__main__":
    main()
