#!/usr/bin/env bash
# bitsandbytes 0.50.2: an 8-bit optimizer loads the state dict of another kind, and takes its hyper-parameters.
#
# All name their states state1 and state2, and nothing in the state dict tells whose they are. What AdamW8bit saved
# loads into Lion8bit, which goes on with Adam's betas and learning rate; and into RMSprop8bit and Adagrad8bit, which
# take the first moment for a mean of squares: where it is negative the next step makes the weight NaN (34% and 14% of
# them).
# Expected: an error, as of torch.optim.RMSprop, which raises a KeyError.
# Why it matters: to resume with another optimizer is one changed word in a training script.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
finding <<'PYTHON'
import bitsandbytes.optim as bnb
import torch

torch.manual_seed(0)


def step(parameter, optimizer):
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def saved_by(optimizer_class):
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = optimizer_class([parameter], lr=1e-3)
    for _ in range(5):
        step(parameter, optimizer)
    return optimizer.state_dict()


def resumed(optimizer_class, state_dict):
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = optimizer_class([parameter], lr=1e-4)
    optimizer.load_state_dict(state_dict)
    step(parameter, optimizer)
    return parameter, optimizer


adamw = saved_by(bnb.AdamW8bit)
for name in ("Lion8bit", "RMSprop8bit", "Adagrad8bit"):
    parameter, optimizer = resumed(getattr(bnb, name), adamw)
    group = optimizer.param_groups[0]
    nan = parameter.isnan().float().mean().item()
    print(f"{name} from AdamW8bit's state: betas {group['betas']}, lr {group['lr']}, NaN after a step {nan:.0%}")
    assert tuple(group["betas"]) == (0.9, 0.999) and group["lr"] == 1e-3
    assert nan == 0 if name == "Lion8bit" else nan > 0.1

lion = bnb.Lion8bit([torch.nn.Parameter(torch.zeros(4))]).param_groups[0]["betas"]
print(f"Lion8bit's own betas: {lion}")
assert tuple(lion) == (0.9, 0.99)

try:
    resumed(torch.optim.RMSprop, saved_by(torch.optim.AdamW))
except KeyError as error:
    print(f"torch.optim.RMSprop from torch.optim.AdamW's state: KeyError {error}")
else:
    raise AssertionError("torch.optim.RMSprop takes AdamW's state, too")
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, bitsandbytes 0.50.2, numpy 2.4.6
#   Lion8bit from AdamW8bit's state: betas (0.9, 0.999), lr 0.001, NaN after a step 0%
#   RMSprop8bit from AdamW8bit's state: betas (0.9, 0.999), lr 0.001, NaN after a step 34%
#   Adagrad8bit from AdamW8bit's state: betas (0.9, 0.999), lr 0.001, NaN after a step 14%
#   Lion8bit's own betas: (0.9, 0.99)
#   torch.optim.RMSprop from torch.optim.AdamW's state: KeyError 'square_avg'
