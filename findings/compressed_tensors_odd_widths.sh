#!/usr/bin/env bash
# compressed-tensors 0.17.1 and 0.20.1: codes of 3 bits that one of them has packed, the other unpacks to other codes.
#
# Up to 0.17 a word of 32 bits holds whole codes, ten of 3 bits; since 0.18 codes stand bit to bit. Nothing in a file
# says which it is. 0.20.1 unpacks words of 0.17.1 without an error, and gets one code in seven right, which is chance;
# 0.17.1 returns fewer columns than it was asked for. The same holds for 5, 6 and 7 bits; with 2, 4 and 8 both are alike.
# Expected: a version in the header, or an error where the number of words is not what the shape asks for.
# Why it matters: checkpoints of 3 bits that were made by older tools load into random weights after an upgrade.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" \
    torch==2.13.0 compressed-tensors==0.20.1 transformers==5.24.0 numpy==2.4.6
cat >program.py <<'PYTHON'
import sys

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import helpers

ROWS, COLUMNS = 64, 640


def codes_of(bits):
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (ROWS, COLUMNS), generator=generator).to(torch.int8)


version = compressed_tensors.__version__
for bits in range(2, 9):
    name = f"{sys.argv[2]}-{bits}.pt"
    if sys.argv[1] == "pack":
        torch.save(helpers.pack_to_int32(codes_of(bits), bits), name)
        continue
    words = torch.load(name)
    found = helpers.unpack_from_int32(words, bits, torch.Size((ROWS, COLUMNS)))
    expected = codes_of(bits)[:, : found.shape[1]]
    right = (found == expected).float().mean().item()
    print(f"{version} unpacks {bits} bits of {sys.argv[2]}, {words.shape[1]} words a row: "
          f"{found.shape[1]} of {COLUMNS} columns, {right:.0%} of the codes right")
    if bits in (2, 4, 8) or version == sys.argv[2]:
        assert right == 1 and found.shape[1] == COLUMNS
    elif version == "0.20.1":
        assert right < 0.5 and found.shape[1] == COLUMNS
    else:
        assert right < 0.5 and found.shape[1] < COLUMNS
PYTHON
older=(compressed-tensors==0.17.1)
environment/bin/python -m pip install -q --no-deps --target older "${older[@]}" 2>errors || { cat errors >&2; exit 1; }
old() { PYTHONPATH="$folder/older" environment/bin/python program.py "$@" 2>errors || { cat errors >&2; return 1; }; }
new() { environment/bin/python program.py "$@" 2>errors || { cat errors >&2; return 1; }; }
old pack 0.17.1
new pack 0.20.1
old unpack 0.17.1
new unpack 0.20.1
new unpack 0.17.1
old unpack 0.20.1

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, compressed-tensors 0.20.1, transformers 5.24.0, numpy 2.4.6
#   (lines of 2, 4 and 8 bits, and of a package that unpacks its own words, left out: all columns, 100%)
#   0.20.1 unpacks 3 bits of 0.17.1, 64 words a row: 640 of 640 columns, 14% of the codes right
#   0.20.1 unpacks 5 bits of 0.17.1, 107 words a row: 640 of 640 columns, 4% of the codes right
#   0.20.1 unpacks 6 bits of 0.17.1, 128 words a row: 640 of 640 columns, 2% of the codes right
#   0.20.1 unpacks 7 bits of 0.17.1, 160 words a row: 640 of 640 columns, 1% of the codes right
#   0.17.1 unpacks 3 bits of 0.20.1, 60 words a row: 600 of 640 columns, 14% of the codes right
#   0.17.1 unpacks 5 bits of 0.20.1, 100 words a row: 600 of 640 columns, 4% of the codes right
#   0.17.1 unpacks 6 bits of 0.20.1, 120 words a row: 600 of 640 columns, 2% of the codes right
#   0.17.1 unpacks 7 bits of 0.20.1, 140 words a row: 560 of 640 columns, 1% of the codes right
