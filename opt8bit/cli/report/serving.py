"""Says how each runtime runs a compressed model, or why it does not."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator

from opt8bit.cli.report.markup import Html, element, section
from opt8bit.cli.report.record import Record
from opt8bit.ptq.inspect import Contents
from opt8bit.ptq.model.servers import Layer, Packing, warnings_of
from opt8bit.quant.packing import WORD
from opt8bit.recipe.gguf_types import GGUF_TYPES
from opt8bit.recipe.registry import GRIDS
from opt8bit.recipe.runtimes import DENSE, RUNTIMES, Runtime

SCALES = ("weight_scale", "scales")  # behind a layer's name, in each packed format
BLOCK = re.compile(r"(?P<prefix>.*?)\.(?P<number>\d+)\.")


def serving(record: Record) -> Html:
    """Returns the commands, by runtime."""
    parts = [
        element("p", "What each runtime runs was read in its source code, and is kept in opt8bit.recipe.runtimes."),
        element("p", "Whether the checkpoint loads as what was made:"),
        command(f"opt8bit verify {shlex.quote(str(record.folder))}"),
    ]
    for name, runtime in RUNTIMES.items():
        parts.append(element("h3", f"{name}: {runtime.title}"))
        problems = list(_problems(record.contents, runtime))
        parts += [element("p", problem, class_="warning") for problem in problems]
        if not problems:
            parts.append(command(_command(runtime, str(record.folder))))
    return section("How to serve it", *parts)


def command(text: str) -> Html:
    """Returns what is to be typed as a block that scrolls where it is too wide."""
    return element("pre", element("code", text))


def _command(runtime: Runtime, folder: str) -> str:
    return runtime.command.format(folder=folder, quoted=shlex.quote(folder))


def _problems(contents: Contents, runtime: Runtime) -> Iterator[str]:
    """Yields what a runtime does not run of a checkpoint, in sentences."""
    if contents.format == DENSE:
        if not runtime.reads_dense:
            yield f"It does not read the format {DENSE}."
        return
    if contents.format not in runtime.formats:
        yield f"It does not read the format {contents.format}."
        return
    layers = _layers(contents)
    found = [match for match in map(BLOCK.match, layers) if match is not None]
    prefix = found[0]["prefix"] if found else ""
    blocks = len({match["number"] for match in found})
    has_experts = any(".experts." in name for name in contents.tensors)
    yield from warnings_of(contents.format, layers, prefix, blocks, has_experts=has_experts, runtimes=[runtime])
    unlike = [layer for layer in contents.layers.values() if layer.bits and WORD % layer.bits]
    if any(layer.whole_codes != runtime.whole_codes for layer in unlike):
        yield "It packs codes of this width otherwise: compress with --for and its name."


def _layers(contents: Contents) -> dict[str, Layer]:
    """Returns the matrices of the blocks, packed or not."""
    found = {
        name.removesuffix(".weight"): Layer((header.shape[0], header.shape[1]), None)
        for name, header in contents.tensors.items()
        if name.endswith(".weight") and len(header.shape) == 2 and BLOCK.match(name)
    }
    for name, layer in contents.layers.items():
        packing = None
        if layer.bits and layer.grid not in GGUF_TYPES:  # whatever reads GGUF files reads all types
            size = _group_size(contents, name, layer.shape)
            packing = Packing(layer.bits, layer.grid != "asymmetric", size, layer.grid if layer.grid in GRIDS else None)
        found[name] = Layer(layer.shape, packing)
    return found


def _group_size(contents: Contents, name: str, shape: tuple[int, int]) -> int | None:
    """Returns how many weights of a row share a scale, or None where all of them do."""
    outputs, inputs = shape
    headers = [contents.tensors[f"{name}.{part}"] for part in SCALES if f"{name}.{part}" in contents.tensors]
    groups = math.prod(headers[0].shape[:2]) // outputs if headers else 1
    return inputs // groups if groups > 1 else None
