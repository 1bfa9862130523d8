#!/usr/bin/env bash
# bitsandbytes 0.50.2 (and torchao 0.18.0, which has the same map): momentum of 8 bits is not symmetric.
#
# The signed dynamic map has +1 and no -1: its least value is -0.993. A block whose largest element is negative loses
# 0.7% of it in every step, beside the decay. With a constant gradient and momentum 0.99, in 2000 steps SGD8bit moves a
# parameter by 190.1 one way, as torch.optim.SGD does, and by 114.5 the other way.
# Expected: the same distance in both directions, but for rounding.
# Why it matters: this error has a sign and does not average out, and momentum near 1 multiplies it: the effective
# momentum is 0.99 * 0.993 = 0.983.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 bitsandbytes==0.50.2 torchao==0.18.0 numpy==2.4.6
finding <<'PYTHON'
import bitsandbytes
import torch
import torchao.optim.quant_utils as torchao_maps

signed_map = bitsandbytes.functional.create_dynamic_map(signed=True)
same = torch.equal(signed_map, torch.tensor(torchao_maps.create_dynamic_map(signed=True)))
print(f"signed map from {signed_map.min():.4f} to {signed_map.max():.4f}; torchao's has the same bits: {same}")
assert same and signed_map.max() == 1 and abs(signed_map.min() + 0.99297) < 1e-5


def distance_moved(optimizer_class, gradient):
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = optimizer_class([parameter], lr=1e-3, momentum=0.99)
    for _ in range(2000):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return parameter.detach().abs().mean().item()


moved = {}
for optimizer_class in (torch.optim.SGD, bitsandbytes.optim.SGD8bit):
    for gradient in (1.0, -1.0):
        distance = distance_moved(optimizer_class, gradient)
        moved[optimizer_class.__name__, gradient] = distance
        print(f"{optimizer_class.__name__:8} gradient {gradient:+.0f}, 2000 steps: moved {distance:.1f}")
assert abs(moved["SGD", 1.0] - moved["SGD", -1.0]) < 0.1
assert abs(moved["SGD8bit", 1.0] - 190.1) < 0.5
assert abs(moved["SGD8bit", -1.0] - 114.5) < 0.5
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, bitsandbytes 0.50.2, torchao 0.18.0, numpy 2.4.6
#   signed map from -0.9930 to 1.0000; torchao's has the same bits: True
#   SGD      gradient +1, 2000 steps: moved 190.1
#   SGD      gradient -1, 2000 steps: moved 190.1
#   SGD8bit  gradient +1, 2000 steps: moved 190.1
#   SGD8bit  gradient -1, 2000 steps: moved 114.5
