"""Draws the pictures of docs/how-it-works.md by the library's own functions; run it to draw them again.

It needs matplotlib, which ``pip install ".[demo]"`` installs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import opt8bit
from opt8bit.ptq.correction.target import asymmetric_target
from opt8bit.quant import UniformGrid, block_view, dynamic_map, linear_map

FOLDER = Path(__file__).parents[1] / "pictures"
SHAPE, BLOCK_SIZE = (4, 600), 256
BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "tab:gray"
# Text stays text, and the same pictures have the same bytes.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "opt8bit", "axes.spines.top": False, "axes.spines.right": False}


def draw_dynamic_map(axes: Axes) -> None:
    """The values above zero of both maps."""
    maps = {"dynamic_map": dynamic_map(), "linear_map": linear_map()}
    positive = [values[values > 0].tolist() for values in maps.values()]
    axes.eventplot(positive, colors=[BLUE, ORANGE], linelengths=0.7, linewidths=0.8)
    axes.set(
        xscale="log", xlim=(3e-7, 1.2), yticks=[0, 1], yticklabels=list(maps), xlabel="value, of a block's largest"
    )
    axes.invert_yaxis()


def draw_blocks(axes: Axes) -> None:
    """The blocks of a tensor, and where a shard of two rows ends."""
    view = block_view(SHAPE, BLOCK_SIZE)
    for row in range(view.rows):
        for block in range(view.blocks_per_row):
            start = block * view.block_size
            size = min(view.block_size, view.row_length - start)
            axes.barh(row, size - 6, left=start + 3, height=0.8, color=BLUE, alpha=0.35)
            axes.text(start + size / 2, row, str(size), ha="center", va="center")
    axes.axhline(1.5, color=ORANGE, linestyle="--")
    axes.text(view.row_length + 8, 1.5, "a shard", color=ORANGE, va="center")
    axes.set(xlim=(0, view.row_length), xlabel="column", ylabel="row", yticks=range(view.rows))
    axes.invert_yaxis()


def draw_bias_compensation(axes: Axes) -> None:
    """The errors of one output of a layer with 3-bit weights, before and after its bias."""
    layer, rounded = torch.nn.Linear(64, 16), torch.nn.Linear(64, 16)
    grid = UniformGrid(3)
    weight = layer.weight.detach()
    rounded.load_state_dict({"weight": grid.nearest(weight, grid.fit(weight)), "bias": layer.bias.detach()})
    x = torch.randn(4000, 64).relu()  # inputs whose mean is not zero
    y, y_hat = layer(x).detach(), rounded(x).detach()
    compensation = opt8bit.BiasCompensation(16, -1)
    compensation.update(y, y_hat)
    channel = int(compensation.bias.abs().argmax())
    errors = {"before": y - y_hat, "after": y - compensation(y_hat).detach()}
    for (label, error), color in zip(errors.items(), (ORANGE, BLUE), strict=True):
        axes.hist(error[:, channel].numpy(), bins=60, color=color, alpha=0.6, label=label)
    axes.axvline(0, color=GREY)
    axes.set(xlabel="error of the output, y - ŷ", yticks=[])
    axes.legend(frameon=False)


def draw_asymmetric_target(axes: Axes) -> None:
    """A layer of one input: what it should put out, its weight, and the target at full strength."""
    weight = torch.ones(1, 1)
    x = torch.randn(150, 1)
    x_hat = x + 0.6 * torch.randn(150, 1)
    y = x @ weight.T
    missing, hessian = (y - x_hat @ weight.T).T @ x_hat / len(x), x_hat.T @ x_hat / len(x)
    target = asymmetric_target(weight, missing, hessian, strength=1.0)
    axes.scatter(x_hat, y, s=8, color=GREY, alpha=0.6)
    for label, slope, color in (("W", weight, ORANGE), ("W*, α = 1", target, BLUE)):
        axes.axline((0, 0), slope=float(slope), color=color, label=label)
    axes.set(xlabel="input of the compressed model, x̂", ylabel="wanted output, y")
    axes.legend(frameon=False)


PICTURES: dict[str, tuple[Callable[[Axes], None], tuple[float, float]]] = {  # and their sizes in inches
    "dynamic_map": (draw_dynamic_map, (8, 2)),
    "blocks": (draw_blocks, (8, 2.4)),
    "bias_compensation": (draw_bias_compensation, (6, 2.8)),
    "asymmetric_target": (draw_asymmetric_target, (5, 3.6)),
}


def main(folder: Path = FOLDER) -> None:
    for name, (draw, size) in PICTURES.items():
        torch.manual_seed(0)
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.add_subplot())
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
