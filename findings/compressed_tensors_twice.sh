#!/usr/bin/env bash
# compressed-tensors 0.20.1: weights that lie on its symmetric grid change when they are rounded to it again.
#
# The scale of a group is its largest magnitude over 7.5 (at 4 bits), and codes go from -8 to 7. If the largest is at
# code -8, the next pass finds it at -7.5 steps, which rounds to -8: the whole group is then 16/15 as large. Where the
# largest is positive, groups shrink to 14/15. 19 more passes double the norm; at 3 bits it is 7.7 times as large.
# Expected: rounding what is rounded changes nothing, as with asymmetric grids and with GGUF's Q4_0 (gguf 0.19.0).
# Why it matters: many models are to be had in 4 bits only. To dequantize one and to compress it again with the same
# settings, or to go on from a rounded checkpoint, costs accuracy.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" \
    torch==2.13.0 compressed-tensors==0.20.1 gguf==0.19.0 numpy==2.4.6
finding <<'PYTHON'
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from gguf import GGMLQuantizationType, quants

torch.manual_seed(0)
ROWS, COLUMNS, GROUP = 64, 256, 64
WEIGHT = torch.randn(ROWS, COLUMNS)


def rounded(weight, arguments):
    groups = weight.reshape(ROWS, COLUMNS // GROUP, GROUP)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    codes = quantize(weight, scale, zero_point, arguments, dtype=torch.int8)
    return dequantize(codes, scale, zero_point, arguments)


def rounded_to_q4_0(weight):
    blocks = quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
    return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q4_0))


def growth(round_once):
    """Returns the norm after 2 and after 20 passes, over that after the first."""
    weights = [WEIGHT]
    for _ in range(20):
        weights.append(round_once(weights[-1]))
    first = weights[1].norm()
    return (weights[2].norm() / first).item(), (weights[20].norm() / first).item()


for bits, symmetric, low, high in ((4, True, 1.8, 2.5), (3, True, 6.0, 10.0), (8, True, 0.98, 0.995)):
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP)
    twice, often = growth(lambda weight: rounded(weight, arguments))
    print(f"{bits} bits, symmetric: norm x {twice:.4f} by a second pass, x {often:.4f} by 19 more")
    assert low < often < high

arguments = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=GROUP)
for name, round_once in (("4 bits, asymmetric", lambda weight: rounded(weight, arguments)), ("Q4_0", rounded_to_q4_0)):
    twice, often = growth(round_once)
    print(f"{name}: norm x {twice:.4f} by a second pass, x {often:.4f} by 19 more")
    assert abs(often - 1) < 1e-5
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, compressed-tensors 0.20.1, gguf 0.19.0, numpy 2.4.6
#   4 bits, symmetric: norm x 0.9938 by a second pass, x 2.1262 by 19 more
#   3 bits, symmetric: norm x 1.0102 by a second pass, x 7.6917 by 19 more
#   8 bits, symmetric: norm x 0.9990 by a second pass, x 0.9907 by 19 more
#   4 bits, asymmetric: norm x 1.0000 by a second pass, x 1.0000 by 19 more
#   Q4_0: norm x 1.0000 by a second pass, x 1.0000 by 19 more
