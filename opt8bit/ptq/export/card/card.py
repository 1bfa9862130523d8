"""The model card itself: what was compressed and how, what it takes, what was measured, and how to serve it."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt8bit.ptq.export.card.base import (
    BASE_README,
    README,
    TAG,
    base_name,
    hub_id,
    inherited,
    keep_base_card,
    licence_files,
)
from opt8bit.ptq.export.card.measured import measured_by, said, size_of
from opt8bit.ptq.result import Result
from opt8bit.recipe.registry import FORMATS
from opt8bit.recipe.runtimes import Runtime

READ_IN_SOURCES = "Which programs run it was read in the source code of these versions; it was not tried here."


@dataclass(frozen=True)
class About:
    """Says of a compressed model what its result does not.

    Attributes:
        name: of the folder that it will have.
        base: the base model: a folder, or an id of the hub; None for where the source is from.
        text: the calibration text; None where nothing says it.
        recipe: as a recipe file has it; None for that of the result.
        verified: what is known of the written checkpoint.
        measured: what measured the figures of the result, as :func:`measured_by` says it; empty where it is not known.
        what: the sentence that says what was done; None for that of a compression.
    """

    name: str
    base: str | None = None
    text: str | None = None
    recipe: Mapping[str, Any] | None = None
    verified: str | None = None
    measured: Mapping[str, str] = field(default_factory=measured_by)
    what: str | None = None


def write_card(result: Result, folder: Path, format: str, runtimes: Mapping[str, Runtime], about: About) -> None:
    """Writes ``README.md`` into the folder of a written checkpoint.

    The source's own card, which was copied there, is kept as ``BASE_README.md``. What was not measured is not on the
    card.

    Args:
        result: that was written.
        folder: of the checkpoint.
        format: of the checkpoint.
        runtimes: that run it, by name.
        about: what else is known.

    Raises:
        OSError: it cannot be written.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    base = about.base or base_name(result.source)
    of_base = keep_base_card(folder)
    own = inherited(of_base, folder)
    on_hub = hub_id(base) or (of_base.get("base_model") if TAG in (of_base.get("tags") or ()) else None)
    metadata = hub.ModelCardData(
        base_model=on_hub,
        base_model_relation=None if on_hub is None else "quantized",
        library_name="transformers" if FORMATS[format].is_read_by_transformers else format,
        tags=[TAG, format],
        **own,
    )
    named = on_hub or (None if base is None else Path(base).name)
    sections = [
        f"# {about.name}\n\n{about.what or _what(named)}",
        "\n".join(_table(result, folder, format, named, own)),
        *_quality(result, about),
        *_serving(runtimes, about),
        *_recipe(result, about),
    ]
    if (folder / BASE_README).is_file():
        sections.append(f"The card of the base model is kept as [{BASE_README}]({BASE_README}).")
    card = hub.ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    (folder / README).write_text(card.content, encoding="utf-8")


def _what(base: str | None) -> str:
    return f"{base or 'A language model'}, its weights rounded by opt8bit."


def _table(result: Result, folder: Path, format: str, base: str | None, own: Mapping[str, Any]) -> Iterator[str]:
    yield "| | |\n|---|---|"
    if base is not None:
        yield f"| base model | {base} |"
    licence = _licence(own, folder)
    if licence is not None:
        yield f"| licence | {licence} |"
    yield f"| format | {format} |"
    layers = f"{len(result.report)} layers, {result.weights:,} weights"
    yield f"| rounded | {layers} at {result.bits_per_weight:.2f} bits each, scales counted |"
    size = size_of(folder, keeps_others=FORMATS[format].keeps_others)
    files = f"{size.bytes:,} bytes for {size.parameters:,} parameters"
    yield f"| weight files | {files}: {size.bits_per_parameter:.2f} bits per parameter |"


def _licence(own: Mapping[str, Any], folder: Path) -> str | None:
    files = [f"[{name}]({name})" for name in licence_files(folder)]
    name = own.get("license_name") or own.get("license")
    words = [] if name is None or (name == "other" and files) else [str(name)]
    return ", ".join([*words, *files]) + ", as of the base model" if words or files else None


def _quality(result: Result, about: About) -> Iterator[str]:
    found = result.quality
    if found is None:
        return
    text = "the calibration text" if about.text is None else f"`{about.text}`"
    rows = [
        "| | before | after |\n|---|---|---|",
        f"| perplexity | {found.perplexity:.3f} | {found.perplexity_compressed:.3f} |",
    ]
    yield f"## Quality\n\nOn {found.tokens:,} tokens of {text} that nothing was learned from:"
    yield "\n".join(rows)
    yield f"The KL divergence from the predictions before is {found.kl_divergence:.4f} nats a token."
    if about.measured:
        yield f"Measured by {said(about.measured)}."


def _serving(runtimes: Mapping[str, Runtime], about: About) -> Iterator[str]:
    if runtimes:
        yield f"## Serve\n\n{READ_IN_SOURCES} In the folder that has `{about.name}`:"
    for runtime in runtimes.values():
        command = runtime.command.format(folder=about.name, quoted=shlex.quote(about.name))
        yield f"{runtime.title}:\n\n```\n{command}\n```"


def _recipe(result: Result, about: About) -> Iterator[str]:
    recipe = about.recipe
    if recipe is None:
        try:
            recipe = result.recipe.to_dict()
        except ValueError:  # it has objects of somebody's own, which no file holds
            recipe = {"recipe": repr(result.recipe)}
    if recipe:
        yield f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2)}\n```"
    if about.verified is not None:
        yield f"The written checkpoint: {about.verified}."
