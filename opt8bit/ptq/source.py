"""Where a model's weights come from: from a model in memory, or block by block from its checkpoint's files."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import importlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import find_blocks
from opt8bit.ptq.origin import refuse_other_classes, refuse_quantized
from opt8bit.ptq.saved import saved_name
from opt8bit.ptq.tensor_files import bytes_of, opened

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Source(ABC):
    """A model whose blocks are there while they are worked on.

    Attributes:
        model: with everything but its blocks ready to run.
    """

    model: nn.Module

    @abstractmethod
    def block(self, name: str) -> Any:
        """A context in which the block of that name has its weights; the block is what it gives."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers that a checkpoint has, one after another: what is shared once."""

    @abstractmethod
    def copy(self) -> nn.Module:
        """A model of its own with all weights in memory."""

    def code(self) -> Iterable[Path]:
        """Python files that come with the model."""
        return ()


class InMemory(Source):
    """A model that is loaded.

    Args:
        model: any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        yield self.model.get_submodule(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen or not tensor.numel():
                seen.add(tensor.data_ptr())
                yield name, tensor

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)


class Checkpoint(Source):
    """A model of transformers whose blocks stay in its safetensors files until they are asked for.

    Args:
        folder: with a ``config.json`` and weights in safetensors, under the names that the model has for them or that
            ``save_pretrained`` writes.
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        OtherNames: the weights have other names than the model's.
        ValueError: a file is damaged, the weights are quantized already, or it is no causal language model's.
        ImportError: transformers or safetensors is not installed.
    """

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False) -> None:
        self.folder = Path(folder)
        self._files = files_of(self.folder)
        self.model = _skeleton(self.folder, self._files, trust_remote_code)
        names = [name for name, _ in _parameters_and_buffers(self.model)]
        self._stored_names = _stored_names(self.model, self._files.keys())
        blocks, _ = find_blocks(self.model)
        self._load([name for name in names if not name.startswith(f"{blocks}.")])

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        names = [full for full, _ in _parameters_and_buffers(self.model) if full.startswith(f"{name}.")]
        self._load(names)
        try:
            yield self.model.get_submodule(name)
        finally:
            for full in names:
                _set(self.model, full, torch.empty_like(_get(self.model, full), device="meta"))
            _give_back_memory()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _parameters_and_buffers(self.model):
            yield name, self._read([name])[name] if tensor.is_meta else tensor.detach()

    def copy(self) -> nn.Module:
        result = copy.deepcopy(self.model)
        for name, tensor in self.tensors():
            _set(result, name, tensor.clone())
        return result

    def code(self) -> Iterable[Path]:
        return self.folder.glob("*.py")

    def _load(self, names: Iterable[str]) -> None:
        for name, tensor in self._read(names).items():
            had = _get(self.model, name)
            if tensor.shape != had.shape:
                where = self._files[self._stored_names[name]]
                raise ValueError(f"{where}: {name} is {tuple(tensor.shape)}, the model's is {tuple(had.shape)}")
            _set(self.model, name, tensor.to(had.dtype))

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[self._stored_names[name]], []).append(name)
        tensors = {}
        for file, inside in by_file.items():
            with opened(file) as handle:  # only while it is read: what is mapped counts as the process's memory
                for name in inside:
                    tensors[name] = handle.get_tensor(self._stored_names[name]).clone()
        return tensors


def _give_back_memory() -> None:
    """What has been freed goes back to the system: glibc would keep it, as much in the end as the whole model takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors' bytes."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """The file that each tensor of a checkpoint is in.

    Raises:
        ValueError: a file is missing, or damaged, or lacks what the index says it has.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        with opened(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    if not index.is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    try:
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error
    for file in sorted(set(where.values())):
        with opened(folder / file) as handle:
            missing = {name for name, place in where.items() if place == file} - set(handle.keys())
        if missing:
            raise ValueError(f"{folder / file} lacks {min(missing)}, which {INDEX} says it has")
    return {name: folder / file for name, file in where.items()}


def _skeleton(folder: Path, files: Mapping[str, Path], trust_remote_code: bool) -> Any:
    """The model with buffers, and parameters that have a shape and a dtype but no memory."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    refuse_quantized(config)
    refuse_other_classes(config)
    dtype = getattr(config, "dtype", None) or _first_dtype(files)
    with parameters_on_meta():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _first_dtype(files: Mapping[str, Path]) -> torch.dtype:
    name, file = next(iter(files.items()))
    with opened(file) as handle:
        return handle.get_tensor(name).dtype


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, parameters of new modules take no memory. Buffers do: nobody else would compute them."""
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


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint has: shared parameters once, and no buffers that are computed."""
    stored = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in stored.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


class OtherNames(ValueError):
    """A checkpoint's tensors have other names than the model's; whoever loads it has to know how they go together."""


def _stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """The name in the checkpoint of each of the model's parameters and buffers.

    Raises:
        OtherNames: one is not there, or is there as something else.
    """
    tensors = dict(_parameters_and_buffers(model))
    base = getattr(model, "base_model_prefix", "")
    try:
        return _matched({name: name for name in tensors}, stored, base)
    except OtherNames:
        saved = {name: saved_name(model, name, tensor) for name, tensor in tensors.items()}
        renamed = {name: there for name, there in saved.items() if there is not None}
        if len(renamed) < len(saved):
            raise
        return _matched(renamed, stored, base)


def _matched(names: Mapping[str, str], stored: Iterable[str], base: str) -> dict[str, str]:
    """The name in the checkpoint of each of the model's: the one given, or without or with the base model's prefix.

    Raises:
        OtherNames: one is not there.
    """
    stored, found = set(stored), {}
    for own, name in names.items():
        candidates = (name, name.removeprefix(f"{base}."), f"{base}.{name}")
        match = next((candidate for candidate in candidates if candidate in stored), None)
        if match is None:
            raise OtherNames(f"the checkpoint has no {name}")
        found[own] = match
    return found


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, own = name.rpartition(".")
    return getattr(model.get_submodule(owner), own)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor where the model has that parameter or buffer, wherever it is shared."""
    old = _get(model, name)
    is_parameter = isinstance(old, nn.Parameter)
    new = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    for module in model.modules():
        held: dict[str, Any] = module._parameters if is_parameter else module._buffers
        for key, value in held.items():
            if value is old:
                held[key] = new
