"""The libraries that the benchmarks compare with, each where it is installed (``pip install ".[bench]"``)."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opt8bit

Maker = Callable[..., torch.optim.Optimizer]
Quantizer = Callable[[Tensor, int, bool], Tensor]  # (values, block size, signed) -> the values of their codes


def imported(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


for noisy in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # of kernels for other machines than this
    logging.getLogger(noisy).setLevel(logging.ERROR)
bitsandbytes = imported("bitsandbytes")
torchao = imported("torchao.optim")


def adamw() -> dict[str, Maker]:
    """torch's AdamW, ours, and those of others; the first has 32-bit states."""
    return {"torch.optim.AdamW": torch.optim.AdamW, "opt8bit.AdamW8bit": opt8bit.AdamW8bit, **optimizers("AdamW")}


def optimizers(name: str) -> dict[str, Maker]:
    """The 8-bit optimizers of a name of torch.optim's, such as AdamW, by the library's name."""
    found: dict[str, Maker] = {}
    for label, module in (("bitsandbytes", getattr(bitsandbytes, "optim", None)), ("torchao", torchao)):
        kind = getattr(module, f"{name}8bit", None)
        if kind is not None:
            found[f"{label}.{name}8bit"] = partial(kind, momentum=0.9) if name == "SGD" else kind
    return found


class Elsewhere:
    """An optimizer that steps in a process of its own, which waits between steps; to be closed.

    Args:
        folder: where its package was installed (``pip install --target``), which is looked at first.
        settings: of step_worker.py.

    Raises:
        RuntimeError: the package is not in that folder.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        worker = Path(__file__).with_name("step_worker.py")
        command = [sys.executable, str(worker), json.dumps(settings)]
        pipe = subprocess.PIPE
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdout is not None
        file = Path(self._process.stdout.readline().strip())
        if not file.is_relative_to(folder.resolve()):
            self.close()
            raise RuntimeError(f"{settings['module']} is not in {folder}, but in {file}")

    def step_seconds(self) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def quantizers() -> dict[str, Quantizer]:
    """Block-wise quantizers by the dynamic map of 8 bits."""
    found: dict[str, Quantizer] = {}
    if bitsandbytes is not None:
        functional = bitsandbytes.functional
        maps = {signed: functional.create_dynamic_map(signed=signed) for signed in (False, True)}

        def by_bitsandbytes(x: Tensor, block_size: int, signed: bool) -> Tensor:
            codes, state = functional.quantize_blockwise(x, code=maps[signed], blocksize=block_size)
            return functional.dequantize_blockwise(codes, state)

        found["bitsandbytes"] = by_bitsandbytes
    if torchao is not None:
        utils = importlib.import_module("torchao.optim.quant_utils")
        tables = {signed: torch.tensor(utils.create_dynamic_map(signed=signed)) for signed in (False, True)}

        def by_torchao(x: Tensor, block_size: int, signed: bool) -> Tensor:
            scaled, scale = utils.scale_tensor(x, block_size)
            codes = utils.quantize_8bit_with_qmap(scaled, tables[signed])
            return utils.dequant_with_qmap(codes, tables[signed], scale)

        found["torchao"] = by_torchao
    return found
