"""What one process of several does: ``torchrun training.py PHASE FOLDER [WRITER ...]``. Alone: plain tensors."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import end
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import opt8bit
from opt8bit.optim import check_distributed_checkpoint

dcp: Any = importlib.import_module("torch.distributed.checkpoint")
SHAPES = {
    "square": (64, 256),
    "uneven": (70, 300),  # rows that two processes share evenly, and four do not; a short last block
    "few": (3, 2048),  # of four processes one has none
    "image": (16, 16, 5, 5),
    "small": (8, 32),
    "bias": (64,),
}
STEPS, SAVED_AT = 4, 2

CASES: dict[str, tuple[Callable[..., opt8bit.optim.base.Optimizer8bit], torch.dtype, dict[str, Any]]] = {
    "AdamW": (opt8bit.AdamW8bit, torch.float32, {"lr": 1e-2}),
    "AdamW, 32 bits": (opt8bit.AdamW8bit, torch.float32, {"lr": 1e-2, "state_bits": 32}),
    "Adam, amsgrad": (opt8bit.Adam8bit, torch.float32, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "SGD": (opt8bit.SGD8bit, torch.float32, {"lr": 1e-2, "momentum": 0.9, "block_size": 64}),
    "Lion": (opt8bit.Lion8bit, torch.float32, {"lr": 1e-3}),
    "RMSprop": (opt8bit.RMSprop8bit, torch.float32, {"lr": 1e-3, "centered": True, "momentum": 0.9}),
    "Adagrad": (opt8bit.Adagrad8bit, torch.float32, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
    "AdEMAMix": (opt8bit.AdEMAMix8bit, torch.float32, {"lr": 1e-3}),
    "MuonAdamW": (opt8bit.MuonAdamW8bit, torch.float32, {"lr": 1e-3}),
    "AdamW, bfloat16": (opt8bit.AdamW8bit, torch.bfloat16, {"lr": 1e-2}),
    "AdamW, stochastic": (opt8bit.AdamW8bit, torch.bfloat16, {"lr": 1e-4, "stochastic_rounding": True, "seed": 3}),
    "AdamW, compensation": (opt8bit.AdamW8bit, torch.bfloat16, {"lr": 1e-4, "compensation": True}),
}


class Tensors(nn.Module):
    """Parameters of all shapes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            self.register_parameter(name, nn.Parameter(values.to(dtype)))


def made(case: str) -> tuple[nn.Module, opt8bit.optim.base.Optimizer8bit]:
    """A model, sharded where there are processes, and its optimizer."""
    kind, dtype, options = CASES[case]
    model: nn.Module = Tensors(dtype)
    if dist.is_initialized():
        fully_shard(model)
    return model, kind(model if kind is opt8bit.MuonAdamW8bit else model.parameters(), **options)


def placed_as(whole: Tensor, param: Tensor) -> Tensor:
    """A tensor that all processes have, sharded as a parameter."""
    if not isinstance(param, DTensor):
        return whole
    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """With gradients that are the same whoever computes them."""
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * number + i)
        grad = torch.randn(param.shape, generator=generator) * 10.0 ** (i % 3 - 2)
        grad[..., ::7] = 0
        param.grad = placed_as(grad.to(param.dtype), param)
    optimizer.step()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and states, whole, by name."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = whole(param.detach()).clone()
        for key, value in optimizer.state[param].items():
            if isinstance(param, DTensor) and value.dim():
                assert isinstance(value, DTensor) and value.placements == param.placements
                assert len(value.to_local()) == len(param.to_local())
            found[f"{name}.{key}"] = whole(value).clone()
    return found


def checkpoint(folder: Path, writer: object, case: str) -> Path:
    return folder / f"checkpoint-{writer}" / case


class Dying(FileSystemWriter):
    """One process of several is killed when its part is written, and the checkpoint is not whole yet."""

    def write_data(self, *args: Any, **options: Any) -> Any:
        written = super().write_data(*args, **options)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, **options: Any) -> None:
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=path, **options)


def train_until_killed(folder: Path) -> None:
    """A checkpoint, a step, and a checkpoint that one process does not survive."""
    model, optimizer = made("AdamW")
    for number in range(SAVED_AT + 1):
        if number == SAVED_AT:
            save(model, optimizer, checkpoint(folder, "whole", "AdamW"))
        step(model, optimizer, number)
    path = checkpoint(folder, "unfinished", "AdamW")
    save(model, optimizer, path, storage_writer=Dying(path))


def train(folder: Path, writer: object) -> dict[str, dict[str, Any]]:
    """All steps of all cases, with a checkpoint on the way."""
    results = {}
    for case in CASES:
        model, optimizer = made(case)
        for number in range(STEPS):
            if number == SAVED_AT:
                save(model, optimizer, checkpoint(folder, writer, case))
            step(model, optimizer, number)
        results[case] = everything(model, optimizer)
    return results


def resume(folder: Path, writer: object, cases: Iterable[str] = tuple(CASES)) -> dict[str, dict[str, Any]]:
    """The other steps, from a checkpoint that so many processes have written."""
    results = {}
    for case in cases:
        model, optimizer = made(case)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        parts: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        check_distributed_checkpoint(parts, checkpoint(folder, writer, case))
        dcp.load(parts, checkpoint_id=checkpoint(folder, writer, case))
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        for number in range(SAVED_AT, STEPS):
            step(model, optimizer, number)
        results[case] = everything(model, optimizer)
    return results


def main(phase: str, folder: Path, writers: Iterable[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    found: Any = None
    if phase == "train":
        found = train(folder, ranks)
    elif phase == "be-killed":
        train_until_killed(folder)
    elif phase == "go-on":
        found = resume(folder, "whole", ["AdamW"])
    else:
        found = {int(writer) if writer.isdigit() else writer: resume(folder, writer) for writer in writers}
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{phase}-{ranks}.pt")
    end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
