#!/usr/bin/env bash
# FSDP1 of torch 2.13.0 on CPUs: FSDP.optim_state_dict returns one buffer for both of AdamW's states.
#
# With use_orig_params=True on two processes and the default setting (full state dicts, offload_to_cpu=True), "exp_avg"
# and "exp_avg_sq" of a parameter are the same memory, which holds the second moment. Who saves and resumes this begins
# with first moments that are squares of gradients, without an error or a warning. With offload_to_cpu=False, with
# use_orig_params=False, or on one process each state is itself.
# Why it matters: a test on CPUs that an optimizer resumes under FSDP1 fails for torch.optim.AdamW, too; the fault is not
# in the optimizer that is under test.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 numpy==2.4.6
finding <<'PYTHON'
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP


def moments(use_orig_params, settings):
    torch.manual_seed(0)
    model = FSDP(nn.Linear(8, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    if settings:
        config = FullOptimStateDictConfig(**settings)
        FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    state = FSDP.optim_state_dict(model, optimizer)["state"]["weight"]
    return state["exp_avg"], state["exp_avg_sq"]


def process(rank, folder, world_size):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size)
    for use_orig_params, settings in ((True, {}), (True, {"offload_to_cpu": False}), (False, {})):
        first, second = moments(use_orig_params, settings)
        is_one = first.data_ptr() == second.data_ptr()
        if rank == 0:
            about = f"{world_size} processes, use_orig_params={use_orig_params}, {settings or 'default setting'}"
            print(f"{about}: one buffer {is_one}, least exp_avg {first.min():.5f}", flush=True)
            assert is_one == (world_size == 2 and use_orig_params and not settings), about
            assert (first.min() >= 0) == is_one, "a first moment has both signs, a second one has not"
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (2, 1):
            multiprocessing.spawn(process, (folder, world_size), world_size)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, numpy 2.4.6
#   2 processes, use_orig_params=True, default setting: one buffer True, least exp_avg 0.00000
#   2 processes, use_orig_params=True, {'offload_to_cpu': False}: one buffer False, least exp_avg -0.47841
#   2 processes, use_orig_params=False, default setting: one buffer False, least exp_avg -0.47841
#   1 processes, use_orig_params=True, default setting: one buffer False, least exp_avg -0.47841
#   1 processes, use_orig_params=True, {'offload_to_cpu': False}: one buffer False, least exp_avg -0.47841
#   1 processes, use_orig_params=False, default setting: one buffer False, least exp_avg -0.47841
