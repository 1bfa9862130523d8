"""How exact are 8-bit codes, and does a parameter without gradient stay where it is?

    pip install ".[bench]" && python benchmarks/codes.py

Numbers of known distributions, and both moments of Adam as a GPT of the demonstration has them after 300 steps, are
coded and decoded block by block, by this package and by others. Printed is the norm of the error relative to that of
the numbers, and the mean of each number's own relative error. All use the 8-bit dynamic map; the last column is how
many of a hundred exact zeros, strewn in, are zero afterwards. The second table is of a parameter half of whose
gradients are zero always: how far those elements have moved after 1,000 steps of AdamW without weight decay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import write_rows
from peers import Maker, Quantizer, imported, optimizers, quantizers
from torch import Tensor, nn

import opt8bit
from opt8bit.cli import demo
from opt8bit.quant import dequantize_blockwise, dynamic_map, quantize_blockwise

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)
ZEROS = 100


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


def moments(steps: int) -> dict[str, tuple[Tensor, bool]]:
    """Of the demonstration's GPT in training by torch.optim.AdamW, in the order of its parameters."""
    settings = demo.Settings()
    torch.manual_seed(0)
    model = demo.GPT(settings)
    data, _ = demo.split(demo.load_text(None), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        demo.batch_loss(model, data, settings, generator).backward()
        optimizer.step()
    matrices = [param for param in model.parameters() if param.dim() == 2]
    states = {
        name: torch.cat([optimizer.state[param][name].flatten() for param in matrices])
        for name in ("exp_avg", "exp_avg_sq")
    }
    length = len(states["exp_avg"]) // max(BLOCK_SIZES) * max(BLOCK_SIZES)
    return {
        "Adam's first moment": (states["exp_avg"][:length], True),
        "Adam's second moment": (states["exp_avg_sq"][:length], False),
    }


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


def measure(quick: bool) -> list[dict[str, Any]]:
    makers: dict[str, Maker] = {"opt8bit.AdamW8bit": opt8bit.AdamW8bit, **optimizers("AdamW")}
    coders: dict[str, Quantizer] = {"opt8bit": by_opt8bit, **quantizers()}
    data = {**distributions(2**14 if quick else 2**22), **moments(2 if quick else 300)}
    rows: list[dict[str, Any]] = []
    for label, (x, signed) in data.items():
        for block_size in BLOCK_SIZES:
            print(f"\n{label}, {len(x):,} numbers in blocks of {block_size}")
            for name, quantize in coders.items():
                found = errors(x, quantize(x, block_size, signed))
                kept = zeros_kept(quantize, x, block_size, signed)
                about = {"question": "codes", "data": label, "block_size": block_size, "by": name}
                rows.append({**about, **found, "zeros_kept": kept})
                print(f"  {name:<14} norm {found['norm']:9.6f}   mean {found['mean']:11.6f}   zeros kept {kept:3}")
    print("\nelements without gradient have moved, at most, in learning rates")
    for name, make in makers.items():
        steps = 20 if quick else 1000
        moved = drift(make, steps)
        rows.append({"question": "drift", "by": name, "steps": steps, "moved": moved})
        print(f"  {name:<24} {moved:10.3e}")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The mean relative error by block size, a panel for each kind of data."""
    pyplot: Any = imported("matplotlib.pyplot")
    if pyplot is None:
        return
    coded = [row for row in rows if row["question"] == "codes"]
    labels = list(dict.fromkeys(row["data"] for row in coded))
    figure, axes = pyplot.subplots(1, len(labels), figsize=(4 * len(labels), 3.2))
    for axis, label in zip(axes, labels, strict=True):
        for name in dict.fromkeys(row["by"] for row in coded):
            mine = [row for row in coded if row["by"] == name and row["data"] == label]
            axis.loglog([row["block_size"] for row in mine], [row["mean"] for row in mine], "o-", label=name)
        axis.set_title(label)
        axis.set_xlabel("block size")
    axes[0].set_ylabel("mean relative error")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few numbers and steps, to see that it runs")
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/rows/codes.jsonl"), help="where to write rows")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/rows/codes.png"), help="where to save the plot")
    options = parser.parse_args()
    rows = measure(options.quick)
    write_rows(options.rows, rows)
    plot(rows, options.plot)
    print(f"\nRows: {options.rows}; plot: {options.plot}")


if __name__ == "__main__":
    main()
