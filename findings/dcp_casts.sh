#!/usr/bin/env bash
# torch.distributed.checkpoint of torch 2.13.0: dtypes are not compared, and load's error is no Exception.
#
# A saved tensor is cast to the dtype of the one that it is loaded into, in either direction and without a warning:
# codes of 8 bits become float32 moments of 0 to 255, and float32 moments become integers. Shapes are compared, but what
# load raises is a CheckpointException, which derives from BaseException: `except Exception` does not catch it.
# Expected: an error or a warning where floats become integers, and errors that a fallback can catch.
# Why it matters: if codes stand under torch.optim's names ("exp_avg"), a run of an 8-bit optimizer that is resumed by
# torch.optim.AdamW goes on training on bytes; and "resume, or else start anew" ends the program.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 numpy==2.4.6
finding <<'PYTHON'
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException


def through_a_checkpoint(folder, saved, loaded):
    """Returns `loaded` after it was filled from a checkpoint of `saved`."""
    state_dict = {"exp_avg": loaded}
    dcp.save({"exp_avg": saved}, checkpoint_id=folder, no_dist=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load(state_dict, checkpoint_id=folder, no_dist=True)
    about_dtypes = [str(w.message) for w in caught if "dtype" in str(w.message)]
    assert not about_dtypes, about_dtypes
    return state_dict["exp_avg"]


codes = torch.tensor([0, 1, 127, 255], dtype=torch.uint8)
moments = through_a_checkpoint("codes", codes, torch.zeros(4))
print(f"uint8 {codes.tolist()} loads into {moments.dtype} as {moments.tolist()}")
assert moments.dtype == torch.float32 and torch.equal(moments, codes.float())

moments = torch.tensor([-0.5, 0.25, 3.5, 200.0])
codes = through_a_checkpoint("moments", moments, torch.zeros(4, dtype=torch.uint8))
print(f"float32 {moments.tolist()} loads into {codes.dtype} as {codes.tolist()}")
assert codes.tolist() == [0, 0, 3, 200]

try:
    through_a_checkpoint("shapes", moments, torch.zeros(2, 2))
except BaseException as error:
    print(f"another shape: {type(error).__name__}, an Exception: {isinstance(error, Exception)};", end=" ")
    print(str(error).strip().splitlines()[-1])
    assert isinstance(error, CheckpointException) and not isinstance(error, Exception)
    assert "Size mismatch" in str(error)
else:
    raise AssertionError("another shape loads, too")
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, numpy 2.4.6
#   uint8 [0, 1, 127, 255] loads into torch.float32 as [0.0, 1.0, 127.0, 255.0]
#   float32 [-0.5, 0.25, 3.5, 200.0] loads into torch.uint8 as [0, 0, 3, 200]
#   another shape: CheckpointException, an Exception: False; ValueError: Size mismatch between saved torch.Size([4]) and
#     current: torch.Size([2, 2]) for exp_avg
