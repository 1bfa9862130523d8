"""A parameter in shards along its columns, which cut no blocks on 2 processes and do on 4: ``torchrun columns.py FOLDER
SOURCE TARGET`` trains it, or loads it from a checkpoint of the folder, and saves another."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import end
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training import whole

import opt8bit
from opt8bit.optim import check_distributed_checkpoint, convert_distributed_checkpoint

dcp: Any = importlib.import_module("torch.distributed.checkpoint")
SHAPE = (16, 1536)


def main(folder: Path, source: str, target: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "the states of 1 parameters are kept in 32 bits, as shards cut blocks")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(seed: int) -> Any:
        values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        return distribute_tensor(values, mesh, [Shard(1)], src_data_rank=None)

    param = nn.Parameter(placed(0))
    optimizer = opt8bit.AdamW8bit([param], lr=1e-2)
    for number in range(3 if source == "none" else 1):
        param.grad = placed(number + 1)
        optimizer.step()
    parts: dict[str, Any] = {"param": param.detach(), "optimizer": optimizer.state_dict()}
    if source != "none":
        with pytest.raises(
            ValueError, match=r"optimizer\.state\.0\.exp_avg.* is wanted .*convert_distributed_checkpoint"
        ):
            check_distributed_checkpoint(parts, folder / source)
        with pytest.raises(
            CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.state\.0\.exp_avg"
        ):
            dcp.load(parts, checkpoint_id=folder / source)
        with pytest.raises(ValueError, match="new_folder must be missing or empty"):  # on all processes alike
            convert_distributed_checkpoint(parts, folder / source, folder)
        convert_distributed_checkpoint(parts, folder / source, folder / f"{target}-converted")
        check_distributed_checkpoint(parts, folder / f"{target}-converted")
        dcp.load(parts, checkpoint_id=folder / f"{target}-converted")
        optimizer.load_state_dict(parts["optimizer"])
    parts = {"param": param.detach(), "optimizer": optimizer.state_dict()}
    dcp.save(parts, checkpoint_id=folder / target)
    found = {"param": whole(param.detach()), **{name: whole(value) for name, value in optimizer.state[param].items()}}
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{target}.pt")
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4])
