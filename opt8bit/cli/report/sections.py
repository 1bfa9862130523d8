"""The parts of a report: what was reached, at what size, where the errors are, and how it was done."""

from __future__ import annotations

import json
import shlex

from opt8bit.cli.report.charts import lines, powers_of_ten, strip
from opt8bit.cli.report.markup import Html, element, section, table
from opt8bit.cli.report.record import Record, numbers_of
from opt8bit.cli.report.serving import command
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.report import FOLDER, RECIPE

DARKEST = 9  # bits a weight: 8 and a scale


def summary(record: Record) -> Html:
    """Returns the figures that matter most, as a list."""
    report, size = record.report, record.contents.stored_bytes
    figures = [
        (f"{report.bits_per_weight:.2f} bits", f"a weight, scales counted, of {report.weights:,} weights"),
        (f"{size / 1e6:,.1f} MB", _of_source(record)),
    ]
    if report.held_out is not None:
        quality = report.held_out
        figures += [
            (f"{quality.perplexity_compressed:.3f}", f"perplexity, {quality.perplexity:.3f} before"),
            (f"{quality.kl_divergence:.4f}", "nats a token of KL divergence from the predictions before"),
        ]
    cards = (element("div", element("dt", what), element("dd", figure)) for figure, what in figures)
    return element("dl", *cards, class_="summary")


def _of_source(record: Record) -> str:
    if record.source_bytes is None:
        return "of tensors"
    ratio = record.contents.stored_bytes / record.source_bytes
    return f"of tensors, {ratio:.0%} of the source's {record.source_bytes / 1e6:,.1f} MB"


def quality(record: Record) -> Html | None:
    """Returns what held-out text says, or None where there was none."""
    found = record.report.held_out
    if found is None:
        return None
    text = record.run.get("calibration")
    where = f"the calibration text {text}" if text else "the calibration text"
    ratio = found.perplexity_compressed / found.perplexity
    parts = [
        element("p", f"On {found.tokens:,} tokens of {where} that nothing was learned from."),
        table(
            ("", "before", "after", "ratio"),
            [("perplexity", f"{found.perplexity:.4f}", f"{found.perplexity_compressed:.4f}", f"{ratio:.4f}")],
        ),
        element("p", f"The KL divergence from the predictions before is {found.kl_divergence:.5f} nats a token."),
    ]
    return section("Quality", *parts)


def size(record: Record) -> Html:
    """Returns what the files hold, against the source."""
    contents = record.contents
    layers = contents.stored_bytes - contents.other_bytes
    rows = [("matrices" if record.is_dense else "packed layers", layers), ("all other tensors", contents.other_bytes)]
    rows.append(("together", contents.stored_bytes))
    if record.source_bytes is not None:
        rows.append(("the source, as it was read", record.source_bytes))
    most = max(count for _, count in rows)
    bars = [
        (name, f"{count / 1e6:,.2f}", element("div", class_="size", style=f"width:{100 * count / most:.2f}%"))
        for name, count in rows
    ]
    return section(
        "Size",
        table(("", "MB", ""), bars),
        element("p", f"Biases take {record.report.bias_bytes:,} bytes more than the source's."),
    )


def bits(record: Record) -> Html:
    """Returns the bits of each kind of layers, with a cell for each layer."""
    rows = []
    for kind, layers in record.kinds.items():
        widths = [layer.bits_per_weight for layer in layers]
        cells = [
            (f"{layer.name}: {layer.bits_per_weight:.3f} bits", layer.bits_per_weight / DARKEST) for layer in layers
        ]
        least, most = f"{min(widths):.2f}", f"{max(widths):.2f}"
        weights = sum(layer.weights for layer in layers)
        drawn = strip(f"bits of {kind}", cells)
        rows.append((kind, f"{len(layers)}", f"{weights:,}", least if least == most else f"{least} to {most}", drawn))
    return section(
        "Bits by kind of layer",
        element(
            "p", "Everything stored is counted, except biases. A cell is a layer, from the first block to the last."
        ),
        table(("kind", "layers", "weights", "bits a weight", ""), rows),
    )


def errors(record: Record) -> Html:
    """Returns a chart for each kind of layers, with and without the biases."""
    layers = record.report.layers
    has_biases = any(layer.bias_place for layer in layers)
    low, high = powers_of_ten([error for layer in layers for error in (layer.error_rounded, layer.error_corrected)])
    charts = []
    for kind, own in record.kinds.items():
        series = {"rounded": [layer.error_rounded for layer in own]}
        if has_biases:
            series["corrected"] = [layer.error_corrected for layer in own]
        ends = (_block(own[0].name), _block(own[-1].name))
        chart = lines(f"errors of {kind}", series, [_said(layer) for layer in own], ends, range(low, high + 1))
        charts.append(element("figure", element("figcaption", kind), chart))
    legend = "As rounded (grey, dashed), and with its bias (blue)." if has_biases else "The recipe sets no biases."
    return section(
        "Error of each layer's output",
        element("p", f"Squared, relative to the square of the float model's output, over the blocks. {legend}"),
        element("div", *charts, class_="charts"),
    )


def _block(name: str) -> str:
    numbers = numbers_of(name)
    return f"block {numbers[0]}" if numbers else ""


def _said(layer: LayerReport) -> str:
    text = f"{layer.name}: {layer.error_rounded:.3%}"
    return f"{text}, with its bias {layer.error_corrected:.3%}" if layer.bias_place else text


def recipe(record: Record) -> Html:
    """Returns the recipe, the command that repeats the run, and what is recorded of the run."""
    model, text = record.report.about["model"], record.run.get("calibration") or "TEXT"
    file = record.folder / FOLDER / RECIPE
    words = ["opt8bit", "compress", model, "--calibration", text]
    if record.run.get("text_column"):
        words += ["--text-column", record.run["text_column"]]
    words += ["--recipe", str(file), "--output", "DIR"]
    parts = [command(shlex.join(words)), command(json.dumps(record.report.about["recipe"], indent=2))]
    if {"seconds", "verified"} <= record.run.keys():
        parts.append(element("p", f"The run took {record.run['seconds']:,.0f} s; {record.run['verified']}."))
    return section("Recipe", *parts)


def every_layer(record: Record) -> Html:
    """Returns a table of all layers, which is closed at first."""
    rows = [
        (
            layer.name,
            "{} × {}".format(*layer.shape),
            f"{layer.bits_per_weight:.3f}",
            f"{layer.error_rounded:.4%}",
            f"{layer.error_corrected:.4%}",
            layer.bias_place or "",
            layer.note,
        )
        for layers in record.kinds.values()
        for layer in layers
    ]
    headings = ("layer", "outputs × inputs", "bits", "error, rounded", "error, corrected", "bias", "note")
    return element("details", element("summary", f"All {len(rows)} layers"), table(headings, rows))
