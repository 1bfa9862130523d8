"""Loads a written checkpoint as anyone would, and compares what it computes with the model that was compressed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opt8bit.ptq import tensor_files
from opt8bit.ptq.blocks import evaluating
from opt8bit.ptq.report import FOLDER, PROBE

# How far logits may be apart, in units of their own spread: sums in another order, in the model's dtype.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Verification(NamedTuple):
    """What was found.

    Attributes:
        error: the largest difference of a logit, relative to the logits' standard deviation.
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
        lines += [f"dropped on loading: {name}" for name in self.dropped]
        lines += [f"missing: {name}" for name in self.missing]
        return "\n".join(lines)


def verify(folder: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Loads a checkpoint by ``AutoModelForCausalLM.from_pretrained`` and runs the sequence that it was written with.

    Args:
        folder: that :func:`export` or ``opt8bit compress`` wrote.
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        ValueError: there is nothing to compare with, or transformers cannot load the checkpoint.
        ImportError: transformers, or what it needs for the format, is not installed.
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
    transformers: Any = importlib.import_module("transformers")
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except ImportError:
        raise
    except Exception as error:  # whatever transformers raises on a checkpoint is wrong with it
        raise ValueError(f"transformers cannot load {folder}: {error}") from error
    with evaluating(model):
        found = model(**tensors).logits[0, -len(expected) :].float()
    error = float((found - expected).abs().max() / expected.std())
    wrong = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    dtype = _dtype(folder, model)
    return Verification(
        error, TOLERANCES.get(dtype, max(TOLERANCES.values())), sorted(info["unexpected_keys"]), sorted(wrong)
    )


def _dtype(folder: Path, model: Any) -> torch.dtype:
    config = json.loads((folder / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) else model.dtype
