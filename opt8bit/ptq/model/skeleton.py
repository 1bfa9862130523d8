"""Models whose parameters have a shape and a dtype, but no memory until it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.model.checkpoint_files import CheckpointFiles
from opt8bit.ptq.model.origin import refuse_other_classes, refuse_quantized, remove_header


class OnlyWhole(ValueError):
    """A checkpoint that only transformers knows how to make a model of, by loading all of it."""


def skeleton(files: CheckpointFiles, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Any:
    """Returns a checkpoint's model with its buffers, and with parameters on the meta device.

    Args:
        files: of the checkpoint.
        trust_remote_code: whether Python files that come with the model may run.
        dtype: of the parameters; by default as the checkpoint has it.

    Raises:
        OnlyWhole: the model's constructor computes with its parameters.
        ValueError: its weights are quantized already, or it is no causal language model's.
        ImportError: transformers is not installed.
    """
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
    if files.coded is not None:
        remove_header(config)
    refuse_quantized(config)
    refuse_other_classes(config)
    if dtype is None:
        dtype = getattr(config, "dtype", None) or (files.coded.dtype if files.coded else _first_dtype(files))
    try:
        with parameters_on_meta():
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except RuntimeError as error:  # of torch, that values are wanted where there are none
        raise OnlyWhole(f"the model cannot be built without its weights: {error}") from error
    if (files.folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(files.folder)
    return model.eval()


def auto_class(config: Any) -> Any:
    """Returns the class of transformers that makes a configuration's model: one for text alone, where it has one."""
    transformers: Any = importlib.import_module("transformers")
    with_images = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) in with_images and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def device_map(model: Any) -> dict[str, str]:
    """Returns where accelerate shall keep each part of a model: the blocks on disk, everything else in memory."""
    prefix, blocks = find_blocks(model)
    around = {
        name
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{prefix}.") and (module._parameters or module._buffers)
    }
    return {**dict.fromkeys(sorted(around), "cpu"), **{f"{prefix}.{i}": "disk" for i in range(len(blocks))}}


def _first_dtype(files: CheckpointFiles) -> torch.dtype:
    first = next(iter(files.where))
    return files.read([first])[first].dtype


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Lets parameters of new modules take no memory inside the context. Buffers do: nobody else would compute them."""
    had = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        had(module, name, param)
        if param is not None and not param.is_meta:  # what is on it already may be shared
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = had  # type: ignore[method-assign]


def parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns what a checkpoint has, by name: shared tensors once, and no buffers that are computed."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """Returns a parameter or buffer by its name."""
    owner, _, own = name.rpartition(".")
    return getattr(model.get_submodule(owner), own)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor where the model has that parameter or buffer, wherever it is shared."""
    old = get_tensor(model, name)
    is_parameter = isinstance(old, nn.Parameter)
    new = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    for module in model.modules():
        held: dict[str, Any] = module._parameters if is_parameter else module._buffers
        for key, value in held.items():
            if value is old:
                held[key] = new
