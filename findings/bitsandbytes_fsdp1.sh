#!/usr/bin/env bash
# bitsandbytes 0.50.2 under FSDP1 (torch 2.13.0): a full optimizer state dict lacks states, and cannot be loaded.
#
# bitsandbytes hides its codes from FSDP in a nested dict, and FSDP does not gather what is in it. Of two ranks, the
# full state dict of rank 0 has under each of three parameters' names the same codes, those of rank 0's half of them
# all. To load it raises a TypeError. With use_orig_params=True making it raises a RuntimeError.
# Expected: every parameter's states, from all ranks, as of torch.optim; or an error when they are saved.
# Why it matters: the save looks well, and that half of the states are gone shows when the run is to be resumed.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
finding <<'PYTHON'
import os

import bitsandbytes
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP


def stepped(use_orig_params):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(128, 128, bias=False) for _ in range(3)]
    model = FSDP(torch.nn.Sequential(*layers), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2)
    model(torch.randn(16, 128)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def full_state_dict(model, optimizer, rank0_only):
    FSDP.set_state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=rank0_only),
        FullOptimStateDictConfig(rank0_only=rank0_only),
    )
    return FSDP.optim_state_dict(model, optimizer)


def raised(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, optimizer = stepped(use_orig_params=False)
    own_codes = next(iter(optimizer.state.values()))["state1"]
    saved = full_state_dict(model, optimizer, rank0_only=True)
    if rank == 0:
        codes = [state["__bnb_optimizer_quant_state__"]["state1"] for state in saved["state"].values()]
        print(f"saved by rank 0: for parameters of {[128 * 128] * 3} elements, codes of {[c.numel() for c in codes]}")
        assert len(codes) == 3 and all(torch.equal(c, own_codes) for c in codes)
        assert own_codes.numel() == 3 * 128 * 128 // 2
    dist.barrier()
    state_dict = full_state_dict(model, optimizer, rank0_only=False)
    error = raised(FSDP.optim_state_dict_to_load, model, optimizer, state_dict)
    if rank == 0:
        print(f"loading it: {error}")
    assert error is not None and error[0] == "TypeError"
    dist.barrier()
    error = raised(full_state_dict, *stepped(use_orig_params=True), False)
    if rank == 0:
        print(f"saving with use_orig_params=True: {error}")
    assert error is not None and error[0] == "RuntimeError"
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (os.getcwd(),), nprocs=2)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, bitsandbytes 0.50.2, numpy 2.4.6
#   saved by rank 0: for parameters of [16384, 16384, 16384] elements, codes of [24576, 24576, 24576]
#   loading it: ('TypeError', "unhashable type: 'dict'")
#   saving with use_orig_params=True: ('RuntimeError', 'Boolean value of Tensor with more than one value is ambiguous')
