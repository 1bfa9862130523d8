"""FSDP1, whose optimizers are saved and loaded through ``FSDP.optim_state_dict``: ``torchrun fsdp1.py USE_ORIG_PARAMS``
trains on 2 processes, without a stop and with one, and compares."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import end
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import opt8bit

WEIGHT = (2100, 1024)  # of which each process has more than the 2^20 elements that make a flat tensor worth 8 bits
STEPS, SAVED_AT = 4, 2


def made(use_orig_params: bool) -> tuple[FSDP, opt8bit.AdamW8bit]:
    torch.manual_seed(0)
    model = FSDP(nn.Linear(WEIGHT[1], WEIGHT[0]), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    # Of tensors that are on the CPU already, offload_to_cpu=True returns one buffer under the name of every state.
    config = FullOptimStateDictConfig(offload_to_cpu=False)
    FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), config)
    with pytest.warns(UserWarning, match=r"states of 1 parameters are kept in 32 bits, as FSDP1 .*fully_shard") as told:
        optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
    assert [warning.filename for warning in told] == [__file__]
    return model, optimizer


def train(model: FSDP, optimizer: opt8bit.AdamW8bit, steps: range) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(2 * number + dist.get_rank())
        model(torch.randn(4, WEIGHT[1], generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: FSDP, optimizer: opt8bit.AdamW8bit) -> dict[str, Any]:
    """This process's part of parameters and states, by name."""
    found = {name: param.detach().clone() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        found |= {f"{name}.{key}": value.clone() for key, value in optimizer.state.get(param, {}).items()}
    return found


def main(use_orig_params: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", ".*_get_pg_default_device|Multiple backends are registered")  # torch's own calls
    dist.init_process_group("gloo")
    model, optimizer = made(use_orig_params)
    train(model, optimizer, range(SAVED_AT))
    weights, states = copy.deepcopy((model.state_dict(), FSDP.optim_state_dict(model, optimizer)))
    for name, shape in (("weight", WEIGHT), ("bias", WEIGHT[:1])):
        state = states["state"][name]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert {(state[key].dtype, *state[key].shape) for key in ("exp_avg", "exp_avg_sq")} == {(torch.float32, *shape)}
    train(model, optimizer, range(SAVED_AT, STEPS))
    expected = everything(model, optimizer)

    model, optimizer = made(use_orig_params)
    model.load_state_dict(weights)
    optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, states))
    train(model, optimizer, range(SAVED_AT, STEPS))
    found = everything(model, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    end()


if __name__ == "__main__":
    main(sys.argv[1] == "True")
