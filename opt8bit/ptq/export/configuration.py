"""The ``config.json`` of a written checkpoint: the source's own, in its own words, with only what has changed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from opt8bit.ptq.model.bias_places import LLAMA, Place, config_with_places
from opt8bit.ptq.model.checkpoint_files import CONFIG
from opt8bit.ptq.result import Result

DTYPE_WORDS = ("dtype", "torch_dtype")
OF_THIS_RUN = ("_name_or_path", *DTYPE_WORDS, "transformers_version")  # no part of what a model is
# What transformers 5 writes as one object, and everything pinned below 5 looks for under names of its own.
ROPE, ROPE_WORDS = "rope_parameters", ("rope_theta", "rope_scaling", "rope_local_base_freq")


def configuration(result: Result) -> dict[str, Any]:
    """Returns the configuration of a compressed model, but for what it says of its weights."""
    files = result.source.files
    places = {place for place in result.places.values() if place is not None}
    if files is None:
        return _in_older_words(_of_transformers(result, places))
    return with_places(in_dtype(files.config(), result.source.dtype), result.model, places)


def in_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Returns a configuration that names a dtype to load in, in its parts where they name one; None leaves it."""
    if dtype is None:
        return config
    name = str(dtype).removeprefix("torch.")
    config = {
        key: in_dtype(part, dtype) if isinstance(part, dict) and set(DTYPE_WORDS) & part.keys() else part
        for key, part in config.items()
    }
    words = [word for word in DTYPE_WORDS if word in config] or ["torch_dtype"]  # which all versions read
    return {**config, **dict.fromkeys(words, name)}


def write_configuration(config: Mapping[str, Any], folder: Path) -> None:
    """Writes a configuration into a checkpoint's folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _of_transformers(result: Result, places: Iterable[Place]) -> dict[str, Any]:
    """Returns the configuration of a model that has no files, as transformers saves it."""
    model: Any = result.model
    config = config_with_places(model, places)
    if type(config) is type(model.config):
        config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))


def _in_older_words(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration of transformers 5 that older versions, and servers pinned to them, read alike.

    They take the base of the rotary embedding from ``rope_theta``, and where there is none a default of their own.
    """
    config = {key: _in_older_words(part) if key.endswith("_config") else part for key, part in config.items()}
    rope = config.get(ROPE)
    if not isinstance(rope, dict) or any(word in config for word in ROPE_WORDS):
        return config
    whole = rope.get("full_attention", rope)
    sliding = rope.get("sliding_attention")
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        config["rope_local_base_freq"] = sliding["rope_theta"]
    if isinstance(whole, dict) and "rope_theta" in whole:
        config["rope_theta"] = whole["rope_theta"]
        if whole.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"}
    return config


def with_places(config: dict[str, Any], model: Any, places: Iterable[Place]) -> dict[str, Any]:
    """Returns a model's configuration with the switches on that give layers the biases they got.

    Args:
        config: of the source.
        model: that it makes.
        places: of the biases.
    """
    switches = {kind: {place.name: True for place in places if place.kind == kind} for kind in ("switch", "llama")}
    if switches["llama"]:
        return {**_as_llama(config, model, config_with_places(model, places)), **switches["llama"]}
    if not switches["switch"]:
        return config
    section = _section(config, getattr(model.config, "model_type", None))
    if section is None:
        return {**config, **switches["switch"]}
    return {**config, section: {**config[section], **switches["switch"]}}


def _section(config: Mapping[str, Any], model_type: str | None) -> str | None:
    """Returns the part of a composite configuration that is the text model's, or None where that is the whole."""
    if config.get("model_type") == model_type:
        return None
    parts = [name for name, part in config.items() if isinstance(part, dict) and part.get("model_type") == model_type]
    return parts[0] if parts else None


def _as_llama(config: Mapping[str, Any], model: Any, llama: Any) -> dict[str, Any]:
    """Returns the configuration of the same model as a LLaMA, without its own class's words, with defaults spelled out.

    Args:
        config: of the source.
        model: as it is.
        llama: the configuration that makes the same model as a LLaMA.
    """
    transformers: Any = importlib.import_module("transformers")
    defaults = transformers.LlamaConfig().to_dict()
    of_its_class = type(model.config)().to_dict().keys() - defaults.keys()
    kept = {name: value for name, value in config.items() if name not in of_its_class}
    rope = {ROPE, *ROPE_WORDS}
    not_wanted = {*OF_THIS_RUN, *(rope if rope & kept.keys() else ())}
    wanted = {
        name: value
        for name, value in llama.to_dict().items()
        if name not in kept and value != defaults.get(name) and name not in not_wanted
    }
    wanted = _in_older_words(wanted)
    return {**kept, **wanted, "architectures": [LLAMA], "model_type": llama.model_type}
