"""``opt8bit memory``: what the optimizers of this package would save on a model, from its configuration only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opt8bit.cli.errors import CommandError
from opt8bit.optim import memory_report
from opt8bit.optim.memory import readable


def report(model: str, dtype: str, block_size: int | None, min_8bit_size: int | None, ranks: int = 1) -> str:
    """Returns the text that ``opt8bit memory`` prints. No weights are loaded, nor is memory taken for them.

    Args:
        model: a folder with a ``config.json``, or the id of a model on the Hugging Face hub.
        dtype: of the parameters, by name; "config" for the configuration's.
        block_size, min_8bit_size: as the optimizers take them; None for their defaults.
        ranks: processes that share the parameters, as FSDP2 does.

    Raises:
        CommandError: there is no such folder or model, transformers is not installed or cannot build the model, or
            an option has a value it cannot have.
    """
    name = _checked(model)
    network = build(name)
    network.to(dtype=None if dtype == "config" else getattr(torch, dtype))
    try:
        table = memory_report(network, ranks=ranks, **_given(block_size=block_size, min_8bit_size=min_8bit_size))
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in network.parameters()})
    count = sum(param.numel() for param in network.parameters())
    text = f"{type(network).__name__} of {model}: {count:,} elements, {', '.join(dtypes)}\n\n{table}"
    return text if ranks == 1 else f"{text}\n\n{_sharing(network, ranks)}"


def _given(**options: int | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _sharing(network: nn.Module, ranks: int) -> str:
    """Says what FSDP2's processes send each other in a step: the same at 8 bits, as states stay where they are."""
    weights = sum(param.numel() * param.element_size() for param in network.parameters())
    gradients = sum(param.numel() * param.element_size() for param in network.parameters() if param.requires_grad)
    share = (ranks - 1) / ranks
    gathered, reduced = readable(2 * share * weights), readable(share * gradients)
    return (
        f"on each of {ranks} ranks, of which the first has most. In a step each receives up to {gathered} of weights, "
        f"gathered for the forward and for the backward pass, and {reduced} of gradients"
    )


def _checked(model: str) -> str:
    """Returns the model as transformers takes it: what is meant as a path must be a folder with a configuration.

    Raises:
        CommandError: it is not.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.is_dir():
        raise CommandError(f"{model!r} has no config.json")
    if folder.exists():
        raise CommandError(f"{model!r} is a file; MODEL must be a folder with a config.json, or an id of the hub")
    # An id is NAME or OWNER/NAME; anything else can only be a path.
    is_path = model.startswith((".", "~", "/")) or "\\" in model or model.count("/") > 1
    if is_path or model.endswith("/"):
        raise CommandError(f"there is no folder {model!r}")
    return model


def build(name: str) -> nn.Module:
    """Returns a model on the meta device: shapes and dtypes without memory; a language model where there is one.

    Raises:
        CommandError: transformers is not installed, finds no configuration, or cannot build a model from it.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise CommandError(f"{error.name or 'transformers'} is missing: pip install 'opt8bit[memory]'") from error
    try:
        # Code that comes with a configuration is not run.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # configurations are anyone's, and so is what transformers raises on them
        where = "" if Path(name).is_dir() else f"there is no folder {name!r}, and as an id of the hub: "
        raise CommandError(f"cannot read the configuration: {where}{_first_line(error)}") from error
    is_language_model = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    make = transformers.AutoModelForCausalLM if is_language_model else transformers.AutoModel
    try:
        with torch.device("meta"):
            return make.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise CommandError(f"transformers cannot build the model of {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
