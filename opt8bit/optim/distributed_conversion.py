"""convert_distributed_checkpoint: writes a distributed checkpoint again in the layout in which it is to be loaded."""

from __future__ import annotations

import functools
import importlib
import io
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.backends import COMPENSATION
from opt8bit.optim.checkpoint import codes_of
from opt8bit.optim.distributed_blocks import GROUPS, block_size_of, check_blocks
from opt8bit.optim.distributed_checkpoint import check_files, check_listed, read_metadata
from opt8bit.optim.distributed_layout import Form, form_of, is_signed, leaves, name_of, state_of
from opt8bit.optim.distributed_layout import Path as Keys
from opt8bit.optim.options import KEPT
from opt8bit.optim.reading import read_coded, read_full

if TYPE_CHECKING:
    from opt8bit.optim.distributed_files import Item, Source


class Wanted(NamedTuple):
    """Says what a state dict has under a name."""

    path: Keys
    spec: tuple[torch.Size, torch.dtype] | None  # of a tensor
    value: Any  # of what is no tensor, in a parameter group


def convert_distributed_checkpoint(
    state_dict: Mapping[str, Any], folder: str | os.PathLike[str], new_folder: str | os.PathLike[str]
) -> None:
    """Writes a distributed checkpoint again, in the layout in which ``state_dict`` is to be loaded.

    ``torch.distributed.checkpoint.load`` reads a tensor only under its name, in its shape. So it takes a conversion to
    go on with states of other bits (also where they follow from ``min_8bit_size``, or from shards that cut blocks), of
    another ``block_size``, or with states of the old layout, which have an absmax.

    States that stay in 8 bits and in their blocks keep every value, bit for bit. From 8 bits to 32 each becomes the
    exact value of its code. From 32 to 8, or to blocks of another size, they are coded by
    :func:`opt8bit.quant.encode_state`. The options of storage (every option but ``maximize``) are those of
    ``state_dict``, as are entries of parameter groups that the checkpoint lacks; a missing compensation is zero.
    Everything else is copied as it is, also what ``state_dict`` has not.

    Where torch.distributed is initialized, all its processes must call this: the first one converts, and the others
    wait. It reads and writes one tensor at a time, so it takes the memory of the largest state in float32 and its
    codes, and the new checkpoint has a file for each tensor.

    Args:
        state_dict: what is loaded next, as ``torch.distributed.checkpoint.load`` takes it. Of its tensors, plain or
            DTensors, only names, shapes and dtypes count, and nothing is changed.
        folder: that ``torch.distributed.checkpoint.save`` wrote to, on any number of processes.
        new_folder: where to write; missing or empty. Where the conversion fails, nothing is left in it.

    Raises:
        ValueError: ``new_folder`` is not empty; the checkpoint is missing, unfinished or damaged, or lacks a tensor of
            ``state_dict`` in every layout; a tensor is of another shape, codes lie there without scales, or a state has
            a value that it cannot have, or that has no code. The message names the tensor.

    Example:
        >>> parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))  # doctest: +SKIP
        >>> convert_distributed_checkpoint(parts, "step-1000", "step-1000-converted")  # doctest: +SKIP
        >>> dcp.load(parts, checkpoint_id="step-1000-converted")  # doctest: +SKIP
    """
    wanted = _of_all_processes(_wanted(state_dict))
    _on_first_process(lambda: _convert(wanted, Path(folder), Path(new_folder)))


def _wanted(state_dict: Mapping[str, Any]) -> dict[str, Wanted]:
    """Returns what a state dict has, by its name in a checkpoint."""
    found = {}
    for path, value in leaves(state_dict):
        spec = (torch.Size(value.shape), value.dtype) if isinstance(value, Tensor) else None
        name = name_of(path)
        found[name] = Wanted(path, spec, value if spec is None and is_of_group(name) else None)
    return found


def _convert(wanted: Mapping[str, Wanted], folder: Path, new_folder: Path) -> None:
    if new_folder.exists() and (not new_folder.is_dir() or any(new_folder.iterdir())):
        raise ValueError(f"new_folder must be missing or empty, got {new_folder}")
    files: Any = importlib.import_module("opt8bit.optim.distributed_files")
    metadata = read_metadata(folder)
    check_files(metadata.storage_data.items(), folder)
    items = _Conversion(wanted, folder, metadata, files.Source(folder, metadata), files.Item).items()
    was_there = new_folder.exists()
    try:
        files.write(new_folder, items)
    except BaseException:
        shutil.rmtree(new_folder, ignore_errors=True)
        if was_there:
            new_folder.mkdir(exist_ok=True)
        raise


class _Conversion:
    """Lists what a new checkpoint holds, and how each part of it is made from the old one.

    Args:
        wanted: what it is loaded into.
        folder: of the old one.
        metadata: what the old one lists.
        source: its reader.
        item: the class of what is written.
    """

    def __init__(
        self, wanted: Mapping[str, Wanted], folder: Path, metadata: Any, source: Source, item: type[Item]
    ) -> None:
        self._wanted, self._folder, self._source, self._item = wanted, folder, source, item
        self._tensors = {name: each.spec for name, each in wanted.items() if each.spec is not None}
        self._listed: Mapping[str, Any] = metadata.state_dict_metadata
        self._paths: Mapping[str, Keys] = metadata.planner_data or {}
        # Codes and scales of a state are made together, and written one after the other.
        self._made = functools.lru_cache(maxsize=1)(self._converted)

    def items(self) -> dict[str, Item]:
        """Returns what the new checkpoint holds, by name; nothing is read but options.

        Raises:
            ValueError: the checkpoint cannot be converted, by what it lists.
        """
        items: dict[str, Item] = {}
        for name, wanted in self._wanted.items():
            if wanted.spec is None:
                items[name] = self._bytes_item(name, wanted)
            else:
                items[name] = self._item(wanted.path, wanted.spec, self._maker(name, *wanted.spec))
        states = {state for name in self._tensors if (state := state_of(name))}
        for name, listed in self._listed.items():
            if name not in items and state_of(name) not in states:
                path = self._paths.get(name, (name,))
                items[name] = self._copied(name, path, listed)
        return items

    def _copied(self, name: str, path: Keys, listed: Any) -> Item:
        if not hasattr(listed, "size"):
            return self._item(path, None, lambda: self._source.bytes_of(name))
        return self._item(path, (listed.size, listed.properties.dtype), lambda: self._source.tensor(name))

    def _bytes_item(self, name: str, wanted: Wanted) -> Item:
        """Returns the item of what is no tensor: a setting, most often."""
        is_option = name.rpartition(".")[2] in KEPT
        if is_of_group(name) and (is_option or name not in self._listed):
            return self._item(wanted.path, None, lambda: _saved(wanted.value))
        if name not in self._listed:
            raise ValueError(f"{self._folder} has no {name}: it is another model's or optimizer's")
        if hasattr(self._listed[name], "size"):
            raise ValueError(f"{name} must not be a tensor, {self._folder} has one")
        return self._copied(name, wanted.path, self._listed[name])

    def _maker(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Returns what makes a tensor of the new checkpoint."""
        state = state_of(name)
        wanted = form_of(state, self._tensors) if state else None
        saved = form_of(state, self._listed) if state else None
        if state and wanted and saved:
            self._check_state(state, wanted, saved)
            return lambda: self._made(state, wanted, saved)[name]
        if name.endswith(f".{COMPENSATION}") and name not in self._listed and dtype == torch.uint8:
            return lambda: torch.zeros(shape, dtype=dtype, device="cpu")
        check_listed(name, shape, dtype, self._listed, self._folder)
        return lambda: self._source.tensor(name)

    def _check_state(self, state: str, wanted: Form, saved: Form) -> None:
        """Raises ValueError where a state's tensors are not all there, or not of one shape."""
        for form, names, where in ((wanted, self._tensors, "state_dict"), (saved, self._listed, self._folder)):
            for name in form.names:
                if name not in names:
                    raise ValueError(f"{where} has no {name}: it has {state} {form.words}, without it")
        if not all(hasattr(self._listed[name], "size") for name in saved.names):
            raise ValueError(f"{state} must be a tensor, {self._folder} has another kind of value")
        shape, dtype = self._tensors[wanted.codes]
        listed = self._listed[saved.codes]
        if listed.size != shape:
            raise ValueError(
                f"{saved.codes} must have shape {tuple(shape)}, {self._folder} has one of {tuple(listed.size)}"
            )
        listed_dtype = listed.properties.dtype
        if saved.scale is None and not (listed_dtype.is_floating_point or listed_dtype.is_complex):
            raise ValueError(
                f"{saved.codes} must be of real or complex numbers, {self._folder} has {listed_dtype} and no scales "
                "beside it"
            )
        if wanted.scale is not None and dtype != torch.uint8:
            raise ValueError(f"{wanted.codes} must be torch.uint8, state_dict has {dtype}")
        self._block_sizes(state, wanted, saved)

    def _block_sizes(self, state: str, wanted: Form, saved: Form) -> tuple[int, int]:
        """Returns the elements per block of a state as it is wanted and as it is saved; 1 where it is in full."""
        shape, _ = self._tensors[wanted.codes]
        sizes = [1, 1]
        if wanted.scale is not None:
            scale_shape, _ = self._tensors[wanted.scale]
            values = {name: each.value for name, each in self._wanted.items() if is_of_group(name)}
            sizes[0] = block_size_of(state, values, shape, scale_shape, "state_dict")
            check_blocks(wanted.scale, shape, scale_shape, sizes[0], "state_dict")
        if saved.scale is not None:
            scale_shape = self._listed[saved.scale].size
            sizes[1] = block_size_of(state, self._options, shape, scale_shape, str(self._folder))
            check_blocks(saved.scale, shape, scale_shape, sizes[1], str(self._folder))
        return sizes[0], sizes[1]

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        """Returns what the checkpoint says of block sizes, and of whose they are."""
        endings = (".block_size", ".params")
        names = [name for name in self._listed if is_of_group(name) and name.endswith(endings)]
        return {name: self._source.value(name) for name in names if not hasattr(self._listed[name], "size")}

    def _converted(self, state: str, wanted: Form, saved: Form) -> dict[str, Tensor]:
        """Returns the tensors of a state as it is wanted, by name."""
        shape, dtype = self._tensors[wanted.codes]
        block_size, saved_block_size = self._block_sizes(state, wanted, saved)
        signed, where = is_signed(state), str(self._folder)
        # It takes no memory: what is read is checked against its shape and dtype.
        param = torch.empty((), dtype=dtype if wanted.scale is None else torch.float32, device="cpu").expand(shape)
        tensors = [self._source.tensor(name) for name in saved.names]
        if saved.scale is None:
            found = read_full(where, saved.codes, tensors[0], param, signed)
        else:
            names, values = (saved.codes, saved.scale), (tensors[0], tensors[1])
            found = read_coded(where, names, values, param, signed, saved_block_size, is_old=saved.is_old)
        if wanted.scale is None:
            value = found if isinstance(found, Tensor) else found.decoded()
            return {wanted.codes: value.to(dtype)}
        return dict(zip(wanted.names, codes_of(where, state, found, block_size, signed), strict=True))


def is_of_group(name: str) -> bool:
    """Tells whether a name in a checkpoint is one of a parameter group; flattened, its keys are parts of one."""
    return GROUPS in name.split(".")


def _saved(value: Any) -> io.BytesIO:
    """Returns the bytes of a value that is no tensor."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream


def _distributed() -> Any:
    """Returns torch.distributed, or None where only one process runs."""
    dist: Any = importlib.import_module("torch.distributed")
    return dist if dist.is_available() and dist.is_initialized() else None


def _of_all_processes(wanted: dict[str, Wanted]) -> dict[str, Wanted]:
    """Returns what the state dicts of all processes have together: under pipelines each has a part of the model."""
    dist = _distributed()
    if dist is None:
        return wanted
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, wanted)
    return {name: each for part in found for name, each in part.items()}


def _on_first_process(work: Callable[[], None]) -> None:
    """Lets the first process work while the others wait, and raises on all of them what it raises."""
    dist = _distributed()
    if dist is None:
        work()
        return
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            failure = [str(error)]
            dist.broadcast_object_list(failure)
            raise
    dist.broadcast_object_list(failure)
    if dist.get_rank() and failure[0] is not None:
        raise ValueError(failure[0])
