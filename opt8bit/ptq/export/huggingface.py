"""Checkpoints that ``from_pretrained`` loads: for each tensor of the source its change, or itself."""

from __future__ import annotations

import copy
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import CheckpointFormat
from opt8bit.ptq.export.configuration import configuration, write_configuration
from opt8bit.ptq.export.shards import write_shards
from opt8bit.ptq.export.source_record import SourceRecord
from opt8bit.ptq.model.blocks import block_layers, matrix
from opt8bit.ptq.model.checkpoint_files import CheckpointFiles
from opt8bit.ptq.naming import named
from opt8bit.ptq.report import write_probe
from opt8bit.ptq.result import Change, Result
from opt8bit.quant.weight import QuantizedWeight
from opt8bit.recipe.registry import FORMATS
from opt8bit.recipe.runtimes import runtime_of


class HuggingFaceFormat(CheckpointFormat):
    """A folder with safetensors, a ``config.json`` and what else lies beside them.

    Attributes:
        headers: where the configuration has what it says of the weights.
    """

    headers: ClassVar[Sequence[str]] = ("quantization_config",)

    @abstractmethod
    def tensors(self, weight: QuantizedWeight, module: nn.Module) -> dict[str, Tensor]:
        """Returns the tensors that are the weight of a layer, by what stands behind the layer's name."""

    def quantization(self, result: Result) -> dict[str, Any] | None:
        """Returns what the configuration says of the weights, under ``headers``, or None for nothing."""
        return None

    def write(self, result: Result, folder: Path, tokenizer: Any = None) -> None:
        header = self._checked_quantization(result)
        record = SourceRecord(without_place=sorted(result.source.without_place))
        said = {} if header is None else {key: dict(header) for key in self.headers}
        write_configuration({**configuration(result), **said}, folder)
        if result.source.files is None:
            _write_generation(result.model, folder)
        else:
            copy_side_files(result.source.files, folder)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, folder)
        record.changed += self.write_tensors(self._overlaid(result, record), result, folder)
        record.write(folder)
        if result.probe is not None:
            write_probe(result.probe, folder)

    def write_tensors(self, tensors: Iterator[tuple[str, Tensor]], result: Result, folder: Path) -> list[str]:
        """Writes the tensors of a checkpoint into its folder, in which all else lies already.

        Args:
            tensors: by name, in the order in which they are to be read.
            result: of which they are.
            folder: of the checkpoint.

        Returns:
            The names of those that are stored in another dtype.
        """
        write_shards(tensors, folder)
        return []

    def _overlaid(self, result: Result, record: SourceRecord) -> Iterator[tuple[str, Tensor]]:
        """Yields for each tensor of the source its change, or itself; and behind its weight the bias that a layer got.

        Args:
            result: the source and the changes.
            record: gets the source's tensors.
        """
        layers = block_layers(result.model)
        names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
        names += [name for name in result.changes if name.rpartition(".")[0] not in layers]
        by_stored_name = {stored_parameter(result, name): name for name in names}
        for there, tensor in result.source.tensors():
            record.add(there, tensor)
            name = by_stored_name.get(there, "")
            owner, _, kind = name.rpartition(".")
            prefix = there.removesuffix(kind)
            change = result.changes.get(name)
            if change is None:
                yield there, tensor
            else:
                record.changed.append(there)
                with named(owner):
                    parts = self._changed(change, result.model.get_submodule(owner), kind)
                for suffix, part in parts.items():
                    yield there if suffix == kind else f"{prefix}{suffix}", part
            bias = _new_bias(result, owner, layers[owner]) if kind == "weight" and owner in layers else None
            if bias is not None:
                record.added.append(f"{prefix}bias")
                yield f"{prefix}bias", bias

    def _checked_quantization(self, result: Result) -> dict[str, Any] | None:
        """Returns what the configuration says of the weights, if by it this format is found again.

        Raises:
            ValueError: it is not.
        """
        header = self.quantization(result)
        registered = FORMATS.get(f"{(header or {}).get('quant_method')}")
        found = None if registered is None else registered.for_runtime(runtime_of(result.plan.runtime))
        if self.is_packed and found != self:
            name = f"{type(self).__name__}.quantization"
            raise ValueError(f"{name} must have the format's name in FORMATS as quant_method, got {header!r}")
        return header

    def _checked(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a weight's tensors, if they are what the format says of them.

        Raises:
            TypeError: they are no tensors by name.
            ValueError: they have other names than ``parts``, or are not finite.
        """
        name = f"{type(self).__name__}.tensors"
        if not isinstance(tensors, dict) or not all(isinstance(part, Tensor) for part in tensors.values()):
            raise TypeError(f"{name} must return tensors by name, got {tensors!r}")
        if not {*self.parts[:1]} <= tensors.keys() <= {*self.parts} or not tensors:
            allowed = f"its parts, {', '.join(self.parts) or 'which are none'}, at least the first"
            raise ValueError(f"{name} must return {allowed}, got {', '.join(tensors) or 'nothing'}")
        for part, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                raise ValueError(f"{name}, {part}, must be finite")
        return tensors

    def _changed(self, change: Change, module: nn.Module, kind: str) -> dict[str, Tensor]:
        """Returns the tensors that hold a changed parameter, by what stands behind its layer's name."""
        if isinstance(change, QuantizedWeight):
            return self._checked(self.tensors(change, module))
        had: Tensor = getattr(module, kind)
        return {kind: change.to(had.dtype)}  # in which it is computed; the source may have another


def _new_bias(result: Result, layer: str, module: nn.Module) -> Tensor | None:
    """Returns the bias that a layer without one has got.

    Zeros, where it got none but the configuration's switch is on for others: whoever loads the checkpoint makes a bias
    for every layer that a switch gives one, and must find them all.
    """
    if module.bias is not None:
        return None
    bias, weight = result.changes.get(f"{layer}.bias"), matrix(module)
    if isinstance(bias, Tensor):
        return bias.to(weight.dtype)
    place = result.places.get(layer)
    is_switched = place is not None and place.kind in ("switch", "llama")
    return torch.zeros(len(weight), dtype=weight.dtype, device="cpu") if is_switched else None


def stored_parameter(result: Result, name: str) -> str | None:
    """Returns the checkpoint's name of a parameter, or None where the model has none of that name."""
    owner, _, kind = name.rpartition(".")
    if getattr(result.model.get_submodule(owner), kind) is None:
        return None
    return result.source.stored_name(name)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """
    Raises:
        OSError: it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # where the disk is full tokenizers raises a plain one
        raise OSError(f"cannot write the tokenizer to {folder}: {error}") from error


def _write_generation(model: nn.Module, folder: Path) -> None:
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained, which refuses what from_pretrained takes, such as a temperature where nothing is sampled.
        generation = copy.copy(generation)
        generation.compile_config = None  # is of this machine
        generation.to_json_file(folder / "generation_config.json")


def copy_side_files(files: CheckpointFiles, folder: Path) -> None:
    """Copies what belongs to a model besides its weights and its configuration.

    Raises:
        OSError: one cannot be read or written.
    """
    for path in files.side_files():
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files.folder / path, folder / path)
        except OSError as error:
            raise OSError(f"cannot copy {path} from {files.folder} to {folder}: {error.strerror}") from error
