"""Writes what a compression did, and what the checkpoint is checked by."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model import tensor_files
from opt8bit.ptq.result import Result
from opt8bit.ptq.tasks.task import Probe, Quality

FOLDER = "opt8bit"  # inside a checkpoint
REPORT, LAYERS, PAGE, PROBE = "report.json", "layers.csv", "report.html", "probe.safetensors"
RECIPE, RUN = "recipe.json", "run.json"  # of opt8bit compress


def write_report(result: Result, checkpoint: Path, about: Mapping[str, Any]) -> Path:
    """Writes the folder :data:`FOLDER` into a checkpoint; ``about`` goes into the JSON as it is.

    Returns:
        The folder.
    """
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / REPORT).write_text(valid_json(as_json(result, about), indent=2) + "\n")
    with (folder / LAYERS).open("w", newline="") as file:
        rows = [_row(layer) for layer in result.report]
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


@dataclass(frozen=True)
class StoredReport:
    """A report that :func:`write_report` wrote.

    Attributes:
        version: of the package that compressed.
        weights: how many were compressed.
        bits_per_weight: of all of them together, everything stored counted, but the biases.
        bias_bytes: that biases take beyond what the model had.
        seconds: that the layers took.
        held_out: how good the model is on text that was held out; None where there was none.
        layers: one row a layer, NaN for what was not finite.
        about: what else was written.
    """

    version: str
    weights: int
    bits_per_weight: float
    bias_bytes: int
    seconds: float
    held_out: Quality | None
    layers: list[LayerReport]
    about: Mapping[str, Any]


def read_report(checkpoint: Path) -> StoredReport:
    """Reads the report in a checkpoint's folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = checkpoint / FOLDER / REPORT
    if not path.is_file():
        writer = "which opt8bit compress writes, and ptq.export does not"
        raise ValueError(f"{checkpoint} has no {FOLDER}/{REPORT}, {writer}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        held_out = found.pop("held_out")
        return StoredReport(
            version=str(found.pop("version")),
            weights=int(found.pop("weights")),
            bits_per_weight=float(found.pop("bits_per_weight")),
            bias_bytes=int(found.pop("bias_bytes")),
            seconds=float(found.pop("seconds")),
            held_out=None if held_out is None else _quality(held_out),
            layers=[_layer(row) for row in found.pop("layers")],
            about=found,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _quality(held_out: Mapping[str, Any]) -> Quality:
    tokens, *others = (_number(held_out[name]) for name in Quality._fields)
    return Quality(int(tokens), *others)


def _layer(row: Mapping[str, Any]) -> LayerReport:
    """Reads what :func:`_row` has written."""
    numbers = ("bits_per_weight", "error_rounded", "error_corrected", "bias_norm", "seconds")
    found = {**row, **{name: _number(row[name]) for name in numbers}}
    return LayerReport(shape=(int(found.pop("outputs")), int(found.pop("inputs"))), **found)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def write_probe(probe: Probe, checkpoint: Path) -> None:
    """Writes what :func:`opt8bit.ptq.verify` compares a checkpoint with."""
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    tensor_files.save({**probe.inputs, "logits": probe.logits}, checkpoint / FOLDER / PROBE)


def as_json(result: Result, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report: ``about``, sums over all layers, quality, what came of learning, and one object a layer."""
    return {
        "version": version("opt8bit"),
        **about,
        "weights": result.weights,
        "bits_per_weight": result.bits_per_weight,
        "bias_bytes": result.bias_bytes,
        "seconds": sum(layer.seconds for layer in result.report),
        "held_out": None if result.quality is None else result.quality._asdict(),
        **({} if result.refined is None else {"refined": asdict(result.refined)}),
        "layers": [_row(layer) for layer in result.report],
    }


def valid_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON, with null for every number that is not finite, as JSON has no such numbers."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(layer: LayerReport) -> dict[str, Any]:
    outputs, inputs = layer.shape
    row = asdict(layer)
    del row["shape"]
    return {"name": row.pop("name"), "outputs": outputs, "inputs": inputs, **row}
