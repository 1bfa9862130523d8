"""Shows how the codes and scales of a few layers are distributed."""

from __future__ import annotations

from itertools import pairwise

import numpy
import torch

from opt8bit.cli.errors import CommandError
from opt8bit.cli.report.charts import histogram
from opt8bit.cli.report.markup import Html, element, section
from opt8bit.cli.report.record import Record
from opt8bit.ptq.inspect import unpacked_weight
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.recipe.registry import GRIDS

BINS = 24  # of scales


def codes(record: Record) -> Html | None:
    """Returns histograms of the layers with the least, the middle and the largest error, or None where none is packed.

    Raises:
        CommandError: a layer is damaged.
    """
    layers = chosen(record)
    if not layers:
        return None
    text = "Of the packed layers with the least, the middle and the largest error: how often each code occurs, and how "
    return section(
        "Codes and scales",
        element("p", f"{text}large the scales are."),
        *(_histograms(record, layer) for layer in layers),
    )


def chosen(record: Record) -> list[LayerReport]:
    """Returns the layers to show: packed integers, whose name in the checkpoint is that in the model."""
    integers = {name for name, each in record.contents.layers.items() if each.bits and each.grid not in GRIDS}
    layers = [layer for layer in record.report.layers if layer.name in integers]
    layers.sort(key=lambda layer: layer.error_corrected)
    places = sorted({0, len(layers) // 2, len(layers) - 1})
    return [layers[place] for place in places] if layers else []


def _histograms(record: Record, layer: LayerReport) -> Html:
    try:
        weight = unpacked_weight(record.folder, layer.name)
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    counts = torch.bincount(weight.codes.flatten(), minlength=2 ** (record.contents.layers[layer.name].bits or 0))
    bins = [(f"code {code}", count) for code, count in enumerate(counts.tolist())]
    scale = weight.scale.float()
    heights, edges = numpy.histogram(scale.abs().numpy(), BINS)
    ranges = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    negative = float((scale < 0).float().mean())
    signs = f", {negative:.0%} of them negative," if negative else ""
    return element(
        "div",
        element("h3", f"{layer.name}, error {layer.error_corrected:.3%}"),
        element("p", f"{scale.numel():,} scales{signs} for {weight.codes.numel():,} codes."),
        element(
            "div",
            histogram(f"codes of {layer.name}", bins, ("code 0", f"{len(bins) - 1}")),
            histogram(
                f"scales of {layer.name}",
                list(zip(ranges, heights.tolist(), strict=True)),
                (f"|scale| {edges[0]:.2g}", f"{edges[-1]:.2g}"),
            ),
            class_="charts",
        ),
    )
