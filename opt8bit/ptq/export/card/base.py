"""Finds out what a model card says of the base model: its id on the hub, its licence, its language."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opt8bit.ptq.model.source import Source

README, BASE_README = "README.md", "BASE_README.md"
TAG = "opt8bit"  # of every card that is written here
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
LICENCE_FILE = re.compile(r"(LICEN[CS]E|COPYING)([.-].*)?", re.IGNORECASE)
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the base model's metadata


def base_name(source: Source) -> str | None:
    """Returns where a source is from, a folder or an id of the hub, or None where nothing says it."""
    if source.files is not None:
        return str(source.files.folder)
    config: Any = getattr(source.model, "config", None)
    return getattr(config, "_name_or_path", "") or None


def hub_id(name: str | None) -> str | None:
    """Returns a name if it is an id of the hub, and no folder of this machine, else None.

    Example:
        >>> hub_id("HuggingFaceTB/SmolLM2-135M"), hub_id("./here"), hub_id(None)
        ('HuggingFaceTB/SmolLM2-135M', None, None)
    """
    if name is None or Path(name).exists() or HUB_ID.fullmatch(name) is None:
        return None
    return name


def metadata_of(card: Path) -> dict[str, Any]:
    """Returns the metadata of a model card; nothing where there is no card, or its metadata are damaged."""
    if not card.is_file():
        return {}
    hub: Any = importlib.import_module("huggingface_hub.repocard")
    yaml: Any = importlib.import_module("yaml")  # which huggingface_hub needs, too
    try:
        return hub.metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return {}


def keep_base_card(folder: Path) -> dict[str, Any]:
    """Makes room for a card in a folder that has the files of a source.

    The source's own card is kept as :data:`BASE_README`, except one that was written here.

    Returns:
        The metadata of the source's card.
    """
    card = folder / README
    metadata = metadata_of(card)
    if card.is_file():
        if TAG in (metadata.get("tags") or ()):
            card.unlink()
        else:
            card.replace(folder / BASE_README)
    return metadata


def inherited(metadata: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the metadata that a card takes over from that of its base.

    Args:
        metadata: of the base model's card.
        folder: with what the base model has besides its weights. Where the card names no licence and there is a file
            with one, the metadata points to it.
    """
    found = {name: metadata[name] for name in INHERITED if metadata.get(name)}
    files = list(licence_files(folder))
    if "license" not in found and files:
        found |= {"license": "other", "license_link": files[0]}
    return found


def licence_files(folder: Path) -> Iterator[str]:
    """Yields the names of the files in a folder that have a licence."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and LICENCE_FILE.fullmatch(file.name):
            yield file.name
