"""Draws README's two pictures from the rows of the benchmarks; run it again when rows change.

It needs matplotlib, which ``pip install ".[demo]"`` installs. The metadata of a picture has the figures that it shows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

ROOT = Path(__file__).parents[2]
ROWS, FOLDER = ROOT / "benchmarks" / "rows", ROOT / "docs" / "pictures"
# Of Okabe and Ito's colours, which differ for colour-blind eyes, too.
BLUE, ORANGE, GREY, PALE = "#0072b2", "#d55e00", "#595959", "#d0d0d0"
WIDTH, DPI = 400 / 72, 216  # inches; text of 10 points is 10 pixels high where the picture is 400 pixels wide
STYLE: Any = {"font.size": 10}
TITLE: dict[str, Any] = {"x": 0.01, "ha": "left", "weight": "bold", "size": 10}
OURS = "opt8bit"
GROUP, SCALE_BITS = 64, 16
ORIGINAL = "as it is"
METHODS = {  # the file and the recipe of its rows, a colour, a marker, and where its name is beside the middle point
    "round to nearest": ("compress", "rtn", GREY, "^", (-8, 0)),
    "llm-compressor's\nGPTQ": ("peer_llmcompressor", "llm-compressor, gptq", ORANGE, "s", (-8, 0)),
    OURS: ("compress_smollm2", "default", BLUE, "o", (-8, -8)),
}
MODEL, MOST = "smollm2", 100  # the largest perplexity for which there is room in the picture


def rows(name: str) -> Iterator[dict[str, Any]]:
    """Yields what a benchmark has measured."""
    for line in (ROWS / f"{name}.jsonl").read_text().splitlines():
        yield json.loads(line)


def training() -> dict[str, Any]:
    """Returns GB of memory, GB of states, and losses by seed, each by optimizer."""
    memory = {row["optimizer"]: row for row in rows("training_memory")}
    losses: dict[str, list[float]] = {name: [] for name in memory}
    for row in rows("same_loss"):
        if row["task"] == "gpt":
            losses[row["optimizer"]].append(row["value"])
    return {
        "memory": {name: row["peak_bytes_above_start"] / 1e9 for name, row in memory.items()},
        "states": {name: row["state_bytes"] / 1e9 for name, row in memory.items()},
        "losses": losses,
    }


def compression() -> dict[str, Any]:
    """Returns the perplexities of the runs of each method, by bits a weight; and that of the model as it is."""
    found: dict[str, Any] = {}
    for method, (file, recipe, *_) in METHODS.items():
        found[method] = {}
        for row in selected(file, recipe):
            size = row["bits"] + (SCALE_BITS + row["bits"]) / GROUP  # a scale and a zero point for each group
            found[method].setdefault(f"{size:.2f}", []).append(row["test"])
    return {"methods": found, ORIGINAL: next(row["test"] for row in rows("compress") if row["recipe"] == ORIGINAL)}


def selected(file: str, recipe: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a method on SmolLM2, from few bits to many: those with the most windows of calibration."""
    found = [row for row in rows(file) if row["recipe"] == recipe and row.get("group_size") == GROUP]
    found = [row for row in found if row["model"] == MODEL and row["test"] < MOST]
    for bits in sorted({row["bits"] for row in found}):
        samples = max(row["samples"] for row in found if row["bits"] == bits)
        yield from (row for row in found if row["bits"] == bits and row["samples"] == samples)


def draw_training(figure: Figure, found: dict[str, Any]) -> None:
    """Draws a bar of memory and the losses of each optimizer."""
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    above, below = halves
    above.suptitle("Peak memory of training, LLaMA of 135 million parameters", **TITLE)
    below.suptitle("Validation loss, GPT of 10 million parameters, nats a byte", **TITLE)
    draw_memory(above.add_subplot(), found["memory"], found["states"])
    draw_losses(below.add_subplot(), found["losses"])


def draw_memory(axes: Axes, memory: dict[str, float], states: dict[str, float]) -> None:
    for place, (name, size) in enumerate(memory.items()):
        axes.barh(place, states[name], color=colour(name), height=0.7)
        axes.barh(place, size - states[name], left=states[name], color=PALE, height=0.7)
        text = f"states {states[name]:.2f}" if place == 0 else f"{states[name]:.2f}"
        axes.text(states[name] / 2, place, text, color="white", ha="center", va="center")
        axes.text(size + 0.03, place, f"{size:.2f} GB", va="center")
    first = next(iter(memory))
    axes.text((states[first] + memory[first]) / 2, 0, "all else", ha="center", va="center")
    axes.set(xlim=(0, 3), xticks=[])
    axes.spines["bottom"].set_visible(False)
    by_name(axes, memory)


def draw_losses(axes: Axes, losses: dict[str, list[float]]) -> None:
    for place, (name, values) in enumerate(losses.items()):
        mean = statistics.mean(values)
        axes.plot(values, [place] * len(values), "o", color=colour(name), alpha=0.7, markersize=6)
        axes.plot([mean, mean], [place - 0.35, place + 0.35], color=colour(name), linewidth=2)
        text = f"mean {mean:.3f}" if place == 0 else f"{mean:.3f}"
        axes.text(2.415, place, text, va="center", ha="right")
    axes.set(xlim=(2.366, 2.415), xticks=[2.37, 2.38, 2.39, 2.40])
    by_name(axes, losses)


def by_name(axes: Axes, names: dict[str, Any]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    for name, label in zip(names, axes.get_yticklabels(), strict=True):
        label.set(color=colour(name), weight="bold" if name.startswith(OURS) else "normal")


def colour(name: str) -> str:
    return BLUE if name.startswith(OURS) else GREY


def draw_compression(figure: Figure, found: dict[str, Any]) -> None:
    """Draws the perplexity of each method over the bits of a weight."""
    figure.suptitle("Perplexity of SmolLM2-135M on WikiText-2 (less is better)", **TITLE)
    axes = figure.add_subplot()
    for method, runs in found["methods"].items():
        *_, hue, marker, label = METHODS[method]
        means = {float(size): statistics.mean(values) for size, values in runs.items()}
        axes.plot(list(means), list(means.values()), color=hue, linewidth=1.5)
        for size, values in runs.items():
            axes.plot([float(size)] * len(values), values, marker, color=hue, markersize=6)
        for place, mean in means.items():
            axes.annotate(f"{mean:.1f}", (place, mean), (7, 2), textcoords="offset points", color=hue)
        axes.annotate(
            method, (3.30, means[3.30]), label, textcoords="offset points", color=hue, ha="right", va="center"
        )
    axes.axhline(found[ORIGINAL], color="black", linestyle=":", linewidth=1)
    axes.text(2.2, found[ORIGINAL] * 1.012, f"not rounded: {found[ORIGINAL]:.1f}")
    axes.set(yscale="log", xlim=(2.15, 4.65), ylim=(28, 92), xlabel="bits a weight, scales counted")
    axes.set(xticks=sorted(float(size) for size in found["methods"][OURS]))
    axes.set_yticks([30, 40, 60, 80], ["30", "40", "60", "80"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)


PICTURES: dict[str, tuple[Callable[[], Any], Callable[[Figure, Any], None], float]] = {  # and their height in inches
    "training": (training, draw_training, 4.0),
    "compression": (compression, draw_compression, 3.4),
}


def main(folder: Path = FOLDER) -> None:
    for name, (figures, draw, height) in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            draw(figure, found := figures())
            about = {"Description": json.dumps(found), "Software": None}
            figure.savefig(folder / f"{name}.png", dpi=DPI, metadata=about)


if __name__ == "__main__":
    main()
