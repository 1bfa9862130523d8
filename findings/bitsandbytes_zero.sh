#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU: an exact zero does not stay zero.
#
# The signed map has a 0, and three positive values below 2.1e-5. But the quantizer for CPUs does not return them: 0
# comes back as 2.1e-5 of its block's largest magnitude, as 1e-6 does. Weights whose gradient is always zero then move
# by three learning rates in 1000 steps of Adam8bit, all of them down.
# Expected: zero is coded as the zero of the map, and a parameter without gradient stays where it is.
# Why it matters: padding, unused vocabulary and masked weights drift.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
finding <<'PYTHON'
import bitsandbytes
import bitsandbytes.functional as F
import torch

torch.manual_seed(0)
signed_map = F.create_dynamic_map(signed=True)
block = torch.zeros(256)
block[0], block[1] = 1.0, 1e-6
decoded = F.dequantize_blockwise(*F.quantize_blockwise(block, blocksize=256))
between = ((signed_map > 0) & (signed_map < decoded[2])).sum().item()
print(f"0 beside a 1 comes back as {decoded[2]:.3g}, and 1e-6 as {decoded[1]:.3g};", end=" ")
print(f"positive values of the map below that: {between}")
assert (signed_map == 0).sum() == 1
assert 2.0e-5 < decoded[1] < 2.3e-5 and (decoded[1:] == decoded[1]).all() and between == 3

LEARNING_RATE = 1e-3
drift = {}
for optimizer_class in (torch.optim.Adam, bitsandbytes.optim.Adam8bit):
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = optimizer_class([parameter], lr=LEARNING_RATE)
    for _ in range(1000):
        parameter.grad = torch.randn(64, 64)
        parameter.grad[:, 0] = 0
        optimizer.step()
    column = parameter.detach()[:, 0] / LEARNING_RATE
    drift[optimizer_class.__name__] = column
    print(f"{optimizer_class.__name__}: weights without gradient moved {column.min():.2f} to {column.max():.2f} lr")
assert (drift["Adam"] == 0).all()
assert (drift["Adam8bit"] < -1).all()
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, bitsandbytes 0.50.2, numpy 2.4.6
#   0 beside a 1 comes back as 2.12e-05, and 1e-6 as 2.12e-05; positive values of the map below that: 3
#   Adam: weights without gradient moved 0.00 to 0.00 lr
#   Adam8bit: weights without gradient moved -3.05 to -2.97 lr
