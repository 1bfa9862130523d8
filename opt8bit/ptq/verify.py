"""Loads a written checkpoint by transformers' own means, and compares what it computes with the model that was made.

The blocks stay on disk until they are run, so that a checkpoint larger than memory is verified as any other. What
cannot be run so is loaded whole: weights that transformers cannot unpack one tensor at a time, which are those of
several grids and gptq's, and whatever transformers and accelerate fail to keep on disk.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.ptq import tensor_files
from opt8bit.ptq.blocks import evaluating, find_blocks
from opt8bit.ptq.report import FOLDER, PROBE
from opt8bit.ptq.source import parameters_on_meta

# How far logits may be apart, in units of their own spread: sums in another order, in the model's dtype.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Verification(NamedTuple):
    """What was found.

    Attributes:
        error: the largest difference of a logit, relative to the logits' standard deviation; infinite where a parameter
            is missing, without which nothing is computed.
        tolerance: that it may have.
        dropped: tensors of the checkpoint that the loaded model has no place for, biases among them.
        missing: parameters of the loaded model that the checkpoint does not have.
    """

    error: float
    tolerance: float
    dropped: Sequence[str]
    missing: Sequence[str]

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance and not self.dropped and not self.missing

    def __str__(self) -> str:
        lines = [f"logits differ by {self.error:.1e} of their spread, {self.tolerance:.0e} is allowed"]
        if self.missing:
            lines = ["it cannot be run: parameters are missing"]
        lines += [f"dropped on loading: {name}" for name in self.dropped]
        lines += [f"missing: {name}" for name in self.missing]
        return "\n".join(lines)


def verify(folder: str | Path, *, scratch: str | Path | None = None, trust_remote_code: bool = False) -> Verification:
    """Loads a checkpoint by ``AutoModelForCausalLM.from_pretrained`` and runs the sequence that it was written with.

    Args:
        folder: that :func:`export` or ``opt8bit compress`` wrote.
        scratch: a folder on a disk with room for the weights of the blocks as transformers unpacks them; by default
            that of temporary files.
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        ValueError: there is nothing to compare with, or transformers cannot load the checkpoint, or not run it.
        ImportError: transformers or accelerate, or what they need for the format, is not installed.
        OSError: there is no room on the disk.
    """
    folder = Path(folder)
    probe = folder / FOLDER / PROBE
    if not probe.is_file():
        raise ValueError(f"{folder} has no {FOLDER}/{PROBE}: only what opt8bit compress has written can be verified")
    with tensor_files.opened(probe) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    if not {"logits", "input_ids"} <= tensors.keys():
        raise ValueError(f"{probe} is damaged: it has {', '.join(sorted(tensors))}")
    expected = tensors.pop("logits")
    with suppress(ValueError), TemporaryDirectory(dir=scratch) as unpacked:
        return _compared(folder, tensors, expected, trust_remote_code, unpacked)
    return _compared(folder, tensors, expected, trust_remote_code)


def _compared(
    folder: Path, inputs: dict[str, Tensor], expected: Tensor, trust_remote_code: bool, unpacked: str | None = None
) -> Verification:
    """Loads the checkpoint, its blocks to be kept in the folder ``unpacked`` or whole, and runs it.

    Raises:
        ValueError: transformers cannot do it.
    """
    try:
        model, info = _loaded(folder, trust_remote_code, unpacked)
        missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
        error = math.inf if missing else _error(model, inputs, expected)
    except (ImportError, OSError):
        raise
    except Exception as failure:  # whatever else transformers raises on a checkpoint is wrong with it
        raise ValueError(f"transformers cannot load {folder}: {failure}") from failure
    return Verification(error, _tolerance(folder, model), sorted(info["unexpected_keys"]), missing)


def _error(model: Any, inputs: dict[str, Tensor], expected: Tensor) -> float:
    with evaluating(model):
        found = model(**inputs).logits[0, -len(expected) :].float()
    return float((found - expected).abs().max() / expected.std())


def _loaded(folder: Path, trust_remote_code: bool, unpacked: str | None) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers found on loading it."""
    transformers: Any = importlib.import_module("transformers")
    importlib.import_module("accelerate")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if unpacked is not None:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        options |= _offloading(transformers, config, unpacked, trust_remote_code)
    with _quiet("accelerate.big_modeling"):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True, **options
        )


def _offloading(transformers: Any, config: Any, unpacked: str, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments by which transformers leaves the blocks on disk, unpacked; none where it cannot."""
    quantization: dict[str, Any] | None = getattr(config, "quantization_config", None)
    with parameters_on_meta():
        skeleton = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if quantization is not None:
        if quantization["quant_method"] != "compressed-tensors" or len(quantization["config_groups"]) > 1:
            return {}
        config.quantization_config = {**quantization, "dequantize": True}
    return {"config": config, "device_map": _device_map(skeleton), "offload_folder": unpacked}


def _device_map(model: Any) -> dict[str, str]:
    """Where accelerate shall keep each part of a model: the blocks on disk, everything else in memory."""
    prefix, blocks = find_blocks(model)
    around = {
        name
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{prefix}.") and (module._parameters or module._buffers)
    }
    return {**dict.fromkeys(sorted(around), "cpu"), **{f"{prefix}.{i}": "disk" for i in range(len(blocks))}}


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings of a logger: that parameters are on disk is what was asked for."""
    logger = logging.getLogger(name)
    had = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(had)


def _tolerance(folder: Path, model: Any) -> float:
    config = json.loads((folder / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name) if isinstance(name, str) else model.dtype
    found = TOLERANCES.get(dtype, max(TOLERANCES.values()))
    is_gptq = config.get("quantization_config", {}).get("quant_method") == "gptq"
    return max(found, TOLERANCES[torch.float16]) if is_gptq else found  # GPTQModel decodes weights in float16
