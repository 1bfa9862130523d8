#!/usr/bin/env bash
# torchao 0.18.0: AdamW with states of 8 bits makes a step of 34,000 learning rates where that with 4 bits does not.
#
# One element of each row has one gradient, of 3e-4 of its block's, and then none, as a rare word has. Its second moment
# is then 9e-8 of its block's largest. The 8-bit map and fp8 (e4m3) round that to 0, while the first moment stays, and
# the next step divides by eps. The map of 4 bits has no zero.
# Expected: more bits are safer.
# Why it matters: what counts for a second moment is not the number of values but whether a positive one can become
# zero.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 torchao==0.18.0 numpy==2.4.6 setuptools==84.2.1
finding <<'PYTHON'
import torch
import torchao.optim
from torchao.optim.subclass_4bit import get_qmap_unsigned as map_of_4_bits
from torchao.optim.subclass_8bit import get_qmap_unsigned as map_of_8_bits

LEARNING_RATE = 1e-3


def rare_element_moves(optimizer_class):
    """Returns how many learning rates an element moves in five steps, whose only gradient is small."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = optimizer_class([parameter], lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(5):
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[:, 5] = 3e-4 if step == 0 else 0.0
        optimizer.step()
    return parameter.detach()[:, 5].abs().max().item() / LEARNING_RATE


print(f"least values of the maps: {min(map_of_4_bits())} (4 bits), {min(map_of_8_bits())} (8 bits)")
assert min(map_of_4_bits()) > 0 and min(map_of_8_bits()) == 0
moved = {}
for optimizer_class in (
    torch.optim.AdamW,
    torchao.optim.AdamW4bit,
    torchao.optim.AdamW8bit,
    torchao.optim.AdamWFp8,
):
    name = optimizer_class.__name__
    moved[name] = rare_element_moves(optimizer_class)
    print(f"{name}: {moved[name]:,.1f} learning rates", flush=True)
assert 2.9 < moved["AdamW"] < 3.1
assert moved["AdamW4bit"] < 3
assert moved["AdamW8bit"] > 30_000
assert moved["AdamWFp8"] > 30_000
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, torchao 0.18.0, numpy 2.4.6, setuptools 84.2.1
#   least values of the maps: 0.0625 (4 bits), 0 (8 bits)
#   AdamW: 3.0 learning rates
#   AdamW4bit: 1.0 learning rates
#   AdamW8bit: 33,892.1 learning rates
#   AdamWFp8: 36,847.4 learning rates
