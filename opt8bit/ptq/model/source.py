"""Provides a model's weights: from a model in memory, or block by block from its checkpoint's files."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.model.checkpoint_files import CheckpointFiles
from opt8bit.ptq.model.memory import check_room
from opt8bit.ptq.model.saved import as_saved, check_packed, check_saved, saved_name, stored_names, stored_parts
from opt8bit.ptq.model.skeleton import OnlyWhole, get_tensor, parameters_and_buffers, set_tensor, skeleton
from opt8bit.ptq.model.tensor_files import bytes_of
from opt8bit.quant.grid import SCALE_DTYPES


class Source(ABC):
    """A model whose blocks are there while they are worked on, and the checkpoint that it is.

    Attributes:
        model: with everything but its blocks ready to run.
    """

    model: nn.Module

    @abstractmethod
    def block(self, name: str) -> Any:
        """Returns a context in which the block of that name has its weights; the block is what it gives."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Returns all tensors of the checkpoint by their names there, one after another: what is shared once."""

    @abstractmethod
    def stored_name(self, name: str) -> str | None:
        """Returns the checkpoint's name of one of the model's parameters, or None where it is not stored as it is."""

    @abstractmethod
    def check_stored(self, layers: Iterable[str], *, packed: bool) -> None:
        """Checks that the weights of layers can be replaced in the checkpoint.

        Args:
            layers: by name.
            packed: whether packed weights replace them.

        Raises:
            TypeError: there is no checkpoint of the model.
            ValueError: a weight is not stored as it is, or others beside packed ones cannot be loaded.
        """

    @abstractmethod
    def copy(self) -> nn.Module:
        """Returns a model of its own with all weights in memory."""

    @property
    def files(self) -> CheckpointFiles | None:
        """The checkpoint's files, where there are some."""
        return None

    @property
    def without_place(self) -> Collection[str]:
        """The names of the checkpoint's tensors that the model does not load."""
        return ()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the computation, now and for those who load the result, or None if the checkpoint says it."""
        return None


class Loaded(Source):
    """A model whose weights are all in memory.

    Args:
        model: any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        yield self.model.get_submodule(name)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)


class InMemory(Loaded):
    """A model that was given; its checkpoint is what transformers would save."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen or not tensor.numel():
                seen.add(tensor.data_ptr())
                yield from as_saved(self.model, {name: tensor}).items()

    def stored_name(self, name: str) -> str | None:
        return saved_name(self.model, name, self.model.get_parameter(name))

    def check_stored(self, layers: Iterable[str], *, packed: bool) -> None:
        if not hasattr(self.model, "save_pretrained"):
            raise TypeError(f"only models of transformers can be exported, got {type(self.model).__name__}")
        check_saved(self.model, packed=packed)
        if packed:
            check_packed(self.model, ())


class FromFiles(Source):
    """A model that has been made of a checkpoint's files.

    Args:
        files: of the checkpoint.
        model: made of them.
        dtype: that it was made in, if not as the checkpoint says.
    """

    def __init__(self, files: CheckpointFiles, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.model = model
        self._files, self._dtype = files, dtype
        self._stored_names = stored_names(model, files.where.keys())

    @property
    def files(self) -> CheckpointFiles:
        return self._files

    @property
    def dtype(self) -> torch.dtype | None:
        return self._dtype

    def stored_name(self, name: str) -> str | None:
        return self._stored_names.get(name)

    def load(self, model: nn.Module, names: Iterable[str]) -> None:
        """Reads parameters and buffers into a model.

        Args:
            model: the source's own, or a copy.
            names: in the model.

        Raises:
            ValueError: one has another shape in the checkpoint.
        """
        stored = {self._stored_names[name]: name for name in names}
        for there, tensor in self._files.read(stored).items():
            had = get_tensor(model, stored[there])
            if tensor.shape != had.shape:
                shapes = f"{stored[there]} is {tuple(tensor.shape)}, the model's is {tuple(had.shape)}"
                raise ValueError(f"{self._files.where[there]}: {shapes}")
            set_tensor(model, stored[there], tensor.to(had.dtype))


class Checkpoint(FromFiles):
    """A model of transformers whose blocks stay in its safetensors files until they are asked for.

    Args:
        folder: with a ``config.json`` and weights in safetensors, under the names that the model has for them or that
            ``save_pretrained`` writes.
        trust_remote_code: whether Python files that come with the model may run.
        dtype: float32, bfloat16 or float16, to compute in; by default the checkpoint's own. The configuration of what
            is exported names it, so that whoever loads that computes in it, too.
        unpack: whether packed weights are read as what they stand for.

    Raises:
        OnlyWhole: the weights have other names than the model's, or it cannot be built without them.
        ValueError: ``dtype`` is another one, a file is damaged, the weights are quantized in more than 8-bit codes and
            scales, or in codes of which no header says how they are scaled, or it is no causal language model's. Or the
            machine's memory does not hold one block and what is outside of all.
        ImportError: transformers or safetensors is not installed.

    Warns:
        UserWarning: weights are dequantized, and what a server would quantize beside them is not kept.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
        unpack: bool = False,
    ) -> None:
        if dtype not in (None, *SCALE_DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(map(str, SCALE_DTYPES))}, got {dtype!r}")
        files = CheckpointFiles(Path(folder), unpack=unpack)
        super().__init__(files, skeleton(files, trust_remote_code, dtype), dtype)
        names = parameters_and_buffers(self.model)
        missing = names.keys() - self._stored_names.keys()
        if missing:
            raise OnlyWhole(f"the checkpoint has no {min(missing)}")
        params = {self._stored_names[name] for name, tensor in names.items() if isinstance(tensor, nn.Parameter)}
        self._files.check_dtypes(params)
        check_room(self.model)
        blocks, _ = find_blocks(self.model)
        self.load(self.model, [name for name in names if not name.startswith(f"{blocks}.")])

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        names = [full for full in parameters_and_buffers(self.model) if full.startswith(f"{name}.")]
        self.load(self.model, names)
        try:
            yield self.model.get_submodule(name)
        finally:
            for full in names:
                set_tensor(self.model, full, torch.empty_like(get_tensor(self.model, full), device="meta"))
            give_back_memory()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        # First what the model has, so that the tensors of a block follow each other.
        yield from self._files.tensors([*self._stored_names.values(), *sorted(self.without_place)])

    @property
    def without_place(self) -> Collection[str]:
        return self._files.where.keys() - set(self._stored_names.values())

    def check_stored(self, layers: Iterable[str], *, packed: bool) -> None:
        if packed:
            stored = [self._stored_names.get(f"{name}.weight") for name in layers]
            check_packed(self.model, [name for name in stored if name is not None])

    def copy(self) -> nn.Module:
        result = copy.deepcopy(self.model)
        for name in self._stored_names:
            self.load(result, [name])
        return result


class LoadedCheckpoint(FromFiles, Loaded):
    """A model that transformers has loaded, as it alone knows how its checkpoint's files make a model.

    Args:
        folder: with weights in safetensors.
        model: loaded from there.
        dtype: in which it was loaded, if not as the checkpoint says.

    Raises:
        ValueError: a file is damaged.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: str | Path, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__(CheckpointFiles(Path(folder)), model, dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._files.tensors(self._files.where)

    @property
    def without_place(self) -> Collection[str]:
        return self._files.where.keys() - stored_parts(self.model, self._files.where.keys())

    def check_stored(self, layers: Iterable[str], *, packed: bool) -> None:
        weights = [f"{name}.weight" for name in layers]
        for name in weights:
            if name not in self._stored_names:
                raise ValueError(f"{name} is in other parts in the checkpoint: leave that layer as it is")
        if packed:
            check_saved(self.model, packed=True)
            check_packed(self.model, [self._stored_names[name] for name in weights])


def give_back_memory() -> None:
    """Gives freed memory back to the system: glibc would keep it, in the end as much as the model takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def digest(tensors: Iterable[Tensor]) -> str:
    """Returns a hash of tensors' bytes."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()
