"""Finds out whether a checkpoint has been corrected before, and whether the float model is its origin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from opt8bit.ptq.model.blocks import block_layers
from opt8bit.ptq.report import FOLDER, REPORT
from opt8bit.warning import first_of

RECORD = "correction.json"  # in FOLDER
LISTED = 4


def recorded_correction(folder: Path) -> str | None:
    """Returns what a checkpoint's files say of an earlier correction, as a clause, or None where they say nothing.

    Raises:
        ValueError: a file is damaged.
    """
    if (folder / FOLDER / RECORD).is_file():
        return f"it has {FOLDER}/{RECORD}"
    path = folder / FOLDER / REPORT
    if not path.is_file():
        return None
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        names = [layer["name"] for layer in layers if layer["bias_place"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return f"opt8bit compress has corrected {first_of(names, LISTED)}" if names else None


def found_correction(quantized: nn.Module, reference: nn.Module) -> str | None:
    """Returns which layers of a quantized model have a bias that the float model has not, as a clause; or None."""
    modules = dict(reference.named_modules())
    names = [
        name
        for name, layer in block_layers(quantized).items()
        if layer.bias is not None and getattr(modules.get(name), "bias", None) is None
    ]
    return f"it has biases where the reference has none, in {first_of(names, LISTED)}" if names else None


def check_pair(quantized: nn.Module, reference: nn.Module) -> None:
    """Checks that two models have the same parameters, except biases.

    Raises:
        ValueError: they have not. The message names the first ones.
    """
    found = list(_differences(quantized, reference))
    if found:
        raise ValueError(f"the reference is not what the checkpoint was made of: {first_of(found, LISTED, '; ')}")


def _differences(quantized: nn.Module, reference: nn.Module) -> Iterator[str]:
    shapes, shapes_hat = (
        {name: tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
        for model in (reference, quantized)
    )
    for name, shape in shapes.items():
        if name not in shapes_hat:
            yield f"the checkpoint has no {name}"
        elif shapes_hat[name] != shape:
            yield f"{name} is {shapes_hat[name]} in the checkpoint, {shape} in the reference"
    for name in shapes_hat.keys() - shapes.keys():
        if not name.endswith(".bias"):
            yield f"the reference has no {name}"
