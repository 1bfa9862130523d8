"""Writes a compressed model as a checkpoint. A folder appears under its name when everything in it is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opt8bit.ptq.placement import switches, with_switches
from opt8bit.ptq.result import Result


def export(result: Result, path: str | Path, *, format: str = "dense", tokenizer: Any = None) -> Path:
    """Writes a model that :func:`compress` made, to be loaded by ``from_pretrained``.

    Args:
        result: of :func:`compress`, of a model of transformers.
        path: the folder to make; it must not exist.
        format: "dense" has the compressed weights in the model's own dtype and layout, for anything that loads the
            original.
        tokenizer: saved beside the weights, if given.

    Returns:
        The path.

    Raises:
        FileExistsError: there is something at ``path``.
        TypeError: the model is not one of transformers.
        ValueError: there is no such format, or no format can hold the biases by position.
        OSError: it cannot be written; nothing is left.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not hasattr(result.model, "save_pretrained"):
        raise TypeError(f"only models of transformers can be exported, got {type(result.model).__name__}")
    if result.recipe.statistic == "position":
        raise ValueError("no checkpoint can hold a bias for each position: use statistic='mean' or 'median'")
    with new_folder(Path(path)) as folder:
        write(result, folder, format, tokenizer)
    return Path(path)


def write(result: Result, folder: Path, format: str, tokenizer: Any = None) -> None:
    """Writes the checkpoint's files into a folder, arguments as in :func:`export`."""
    FORMATS[format](result, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into; it takes that name at the end, or disappears with an error.

    Raises:
        FileExistsError: there is something at ``path``.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: give the name of a folder that does not")
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # somebody else has put something there by now
            for parent in missing:
                parent.rmdir()
        raise


def _dense(result: Result, folder: Path) -> None:
    model: Any = result.compressed_model()
    on = switches(result.places) if result.recipe.correct != "none" else []
    if on:
        model.config = with_switches(model, on)
        _zeros_where_none(model, result, set(on))
    model.save_pretrained(folder)


def _zeros_where_none(model: nn.Module, result: Result, on: set[str]) -> None:
    """Whoever loads the checkpoint makes a bias for every layer that a switch gives one: it must find them all."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, place in result.places.items():
        layer = modules[name]
        if place in on and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]), requires_grad=False)


FORMATS: dict[str, Callable[[Result, Path], None]] = {"dense": _dense}
