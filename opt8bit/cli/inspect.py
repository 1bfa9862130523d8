"""``opt8bit inspect``: what is inside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from opt8bit.cli.errors import CommandError
from opt8bit.ptq.inspect import inspect
from opt8bit.ptq.report import FOLDER, REPORT


def report(folder: Path) -> str:
    """
    Raises:
        CommandError: a file is missing or damaged.
    """
    try:
        contents = inspect(folder)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    places = _places(folder)
    width = max((len(name) for name in contents.layers), default=0)
    lines = []
    for name, layer in contents.layers.items():
        bias = f"bias {places.get(name) or ''}".rstrip() if layer.bias else ""
        shape = "{} × {}".format(*layer.shape)
        code = f"{layer.bits}-bit {layer.grid or ''}".rstrip() if layer.bits else "dense"
        lines.append(f"{name:<{width}}  {shape:>15}  {code:<16}  {layer.bits_per_weight:6.3f} bits  {bias}".rstrip())
    packed = [layer for layer in contents.layers.values() if layer.bits]
    if packed:
        weights = sum(layer.weights for layer in packed)
        bits = 8 * sum(layer.stored_bytes for layer in packed) / weights
        lines.append(f"{len(packed)} packed layers, {weights:,} weights at {bits:.3f} bits each, everything counted")
    size, original = contents.stored_bytes, contents.original_bytes
    lines.append(
        f"{contents.format}: {size / 1e6:,.1f} MB, {contents.other_bytes / 1e6:,.1f} MB of them not in these layers; "
        f"{original / 1e6:,.1f} MB with 16 bits a weight ({size / original:.0%})"
    )
    return "\n".join(lines)


def _places(folder: Path) -> dict[str, str | None]:
    """Returns what holds each bias, as the report has it."""
    path = folder / FOLDER / REPORT
    if not path.is_file():
        return {}
    try:
        return {layer["name"]: layer["bias_place"] for layer in json.loads(path.read_text())["layers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is damaged: {error}") from error
