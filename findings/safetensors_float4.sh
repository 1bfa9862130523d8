#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: a file with float4 tensors can be read whole, but by no slice and not from bytes.
#
# torch.float4_e2m1fn_x2 counts bytes of two numbers each, the file's header counts numbers: a tensor of shape [4, 8] is
# [4, 16] in the file and for get_slice(...).get_shape(). No slice of it can be read, not even [:], as the bytes are to
# be reshaped to that. And safetensors.torch.load(bytes) raises a KeyError for what safetensors.torch.save returned.
# Expected: what save_file and load_file handle can also be read in parts and from memory, as float8_e4m3fn can.
# Why it matters: loaders that read a shard (tensor parallelism) or plan by the header's shapes work for 8-bit weights
# and fail for FP4 ones.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
finding <<'PYTHON'
import safetensors
import safetensors.torch
import torch

codes = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
tensors = {"fp8": codes.view(torch.float8_e4m3fn), "fp4": codes.clone().view(torch.float4_e2m1fn_x2)}
safetensors.torch.save_file(tensors, "weights.safetensors")
whole = safetensors.torch.load_file("weights.safetensors")
assert torch.equal(whole["fp4"].view(torch.uint8), codes) and whole["fp4"].shape == (4, 8)

with safetensors.safe_open("weights.safetensors", framework="pt") as file:
    shapes = {name: file.get_slice(name).get_shape() for name in tensors}
    print(f"shape for torch: {list(whole['fp4'].shape)}; shapes in the file: {shapes}")
    assert shapes == {"fp8": [4, 8], "fp4": [4, 16]}
    for rows in (slice(None), slice(0, 2)):
        assert torch.equal(file.get_slice("fp8")[rows].view(torch.uint8), codes[rows])
        try:
            file.get_slice("fp4")[rows]
        except RuntimeError as error:
            print(f"rows {rows.start} to {rows.stop}: RuntimeError: {error}")
            assert "invalid for input of size" in str(error)
        else:
            raise AssertionError("a slice of float4 can be read")

for name, tensor in tensors.items():
    try:
        safetensors.torch.load(safetensors.torch.save({name: tensor}))
        error = None
    except KeyError as raised:
        error = raised
    print(f"{name} from bytes: {error!r}")
    assert (error is None) == (name == "fp8")
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, safetensors 0.8.0, numpy 2.4.6
#   shape for torch: [4, 8]; shapes in the file: {'fp8': [4, 8], 'fp4': [4, 16]}
#   rows None to None: RuntimeError: shape '[4, 16]' is invalid for input of size 32
#   rows 0 to 2: RuntimeError: shape '[4, 16]' is invalid for input of size 32
#   fp8 from bytes: None
#   fp4 from bytes: KeyError('F4')
