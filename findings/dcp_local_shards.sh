#!/usr/bin/env bash
# torch.distributed.checkpoint of torch 2.13.0 under FSDP2: states that are plain tensors come back as rank 0's.
#
# A state that covers a rank's own shard trains correctly as a plain tensor, as parameter and gradient have local ones,
# too. But a checkpoint takes any tensor that is no DTensor for a replicated one and stores it once. Loaded again, rank
# 1 has rank 0's momentum, and a "full" state dict has half of the rows.
# Expected: an error, as the state has not the shape of its parameter; nothing is raised, and nothing is warned of.
# Why it matters: quantized states are not made by zeros_like(parameter), which would give DTensors, so an optimizer has
# to see to it. If it does not, training looks well until it is resumed.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 numpy==2.4.6
finding <<'PYTHON'
import os
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class LocalMomentum(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                weight, gradient = parameter.to_local(), parameter.grad.to_local()
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].mul_(0.9).add_(gradient)
                weight.add_(state["momentum_buffer"], alpha=-group["lr"])


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = LocalMomentum(model.parameters())
    model(torch.eye(4)).square().sum().backward()
    optimizer.step()

    before = optimizer.state[model.weight]["momentum_buffer"].clone()
    checkpoint = f"{folder}/checkpoint"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=checkpoint)
        state_dict = get_optimizer_state_dict(model, optimizer)
        dcp.load(state_dict, checkpoint_id=checkpoint)
        set_optimizer_state_dict(model, optimizer, state_dict)
    assert not any("shard" in str(w.message).lower() or "shape" in str(w.message).lower() for w in caught)
    after = optimizer.state[model.weight]["momentum_buffer"]
    same = torch.equal(before, after)
    for turn in range(2):
        if rank == turn:
            print(f"rank {rank}: its momentum came back: {same}", flush=True)
        dist.barrier()
    assert same == (rank == 0)

    on_rank_0 = before.clone()
    dist.broadcast(on_rank_0, src=0)
    assert torch.equal(after, on_rank_0)

    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    shape = tuple(full["state"]["weight"]["momentum_buffer"].shape)
    if rank == 0:
        print(f"of a weight of shape {tuple(model.weight.shape)} the full state dict has momentum of shape {shape}")
    assert shape == (2, 4)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (os.getcwd(),), nprocs=2)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, numpy 2.4.6
#   rank 0: its momentum came back: True
#   rank 1: its momentum came back: False
#   of a weight of shape (4, 4) the full state dict has momentum of shape (2, 4)
