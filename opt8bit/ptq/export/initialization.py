"""Tries whether a model can be loaded and run without the weights that its checkpoint has packed."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import matrix

MARK = "_is_hf_initialized"  # by which transformers knows tensors and modules that it has loaded
FEW = 8  # tokens of a trial


def needs_weights(model: Any, layers: Iterable[str]) -> bool:
    """Tells whether a model's initialization asks for the ``weight`` of layers, which packed ones do not have.

    transformers 5 initializes every module when it has loaded a checkpoint, whether or not anything was missing. Most
    models then pass over layers without a weight; some reach into them and raise an ``AttributeError``.

    Args:
        model: of transformers; it stays as it is, and its memory is not copied.
        layers: names of those whose weights are packed.
    """
    layers = list(layers)
    bare = _without_weights(model, layers)
    if not _initializes_all():
        for name in layers:  # earlier versions pass over these, for all models
            setattr(bare.get_submodule(name), MARK, True)
    return not _can_be_initialized(bare)


def asks_for_weights(model: Any, layers: Iterable[str]) -> bool:
    """Tells whether a pass through a model asks for the ``weight`` of layers, rather than calling them.

    Before version 5 transformers runs packed layers that have no weight.

    Args:
        model: of transformers; it stays as it is, and its memory is not copied.
        layers: names of those whose weights are packed.
    """
    sizes = {name: len(matrix(model.get_submodule(name))) for name in layers}
    bare = _without_weights(model, sizes)
    for name, size in sizes.items():
        bare.get_submodule(name).__dict__["forward"] = partial(_output_of_size, size)
    try:
        bare(input_ids=torch.zeros(1, FEW, dtype=torch.int64, device="meta"))
    except AttributeError as error:
        return str(error).endswith("'weight'")
    except Exception:  # whatever a model's code raises on tensors without memory says nothing of weights
        return False
    return False


def _output_of_size(size: int, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


def check_initialization(model: Any, layers: Iterable[str]) -> None:
    """Checks that the installed transformers can initialize a model whose checkpoint has packed weights.

    Version 5 always can: a checkpoint may tell it to unpack them first.

    Args:
        model: of transformers; it stays as it is, and its memory is not copied.
        layers: names of those whose weights are packed.

    Raises:
        ValueError: it cannot.
    """
    if _initializes_all():
        return
    bare = _without_weights(model, layers)
    bare.apply(_mark_loaded)
    if not _can_be_initialized(bare):
        version = importlib.import_module("transformers").__version__
        raise ValueError(
            f"transformers {version} cannot load models of type {model.config.model_type} with packed weights, "
            "version 5 can: use format 'dense'"
        )


def _without_weights(model: nn.Module, layers: Iterable[str]) -> Any:
    """Returns a copy that takes no memory, as it is when a checkpoint has just been loaded: only tensors are marked."""
    stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    copies: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        copies[id(tensor)] = _on_meta(tensor)
        setattr(copies[id(tensor)], MARK, id(tensor) in stored)
    bare = copy.deepcopy(model, copies)
    for module in bare.modules():
        setattr(module, MARK, False)
    for name in layers:
        bare.get_submodule(name)._parameters.pop("weight", None)
    return bare


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _mark_loaded(module: nn.Module) -> None:
    """Marks a module all parts of which are marked, as transformers does before version 5."""
    parts = [*module.children(), *module.parameters(recurse=False), *module.buffers(recurse=False)]
    setattr(module, MARK, all(getattr(part, MARK) for part in parts))


def _can_be_initialized(model: Any) -> bool:
    try:
        model.initialize_weights()
    except AttributeError:
        return False
    except RuntimeError:  # what tensors without memory cannot do says nothing of weights
        return True
    return True


def _initializes_all() -> bool:
    """Tells whether transformers initializes modules all of whose parts are loaded, as from version 5 on."""
    return find_spec("transformers.initialization") is not None
