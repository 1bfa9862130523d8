#!/usr/bin/env bash
# bitsandbytes 0.50.2: which states keep 32 bits is stored by position in the optimizer, for the whole process.
#
# StableEmbedding asks for 32-bit states. The request names the module that the constructor made, and becomes "parameter
# 0 of group 0" when an optimizer takes its first step. So a deep copy of the model has 8-bit states in its embedding;
# and after one such model was trained, so has every optimizer's parameter 0 of group 0 states of 32 bits.
# Expected: the request goes with the module (or its parameter), and with no other.
# Why it matters: what keeps a language model's training stable is lost in a copy without a word, and in a notebook or a
# test suite the memory and the results of an 8-bit optimizer depend on what ran before.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
finding <<'PYTHON'
import copy

import bitsandbytes
import torch


def first_state_after_a_step(model):
    """Returns the dtype of the first moment of the model's first parameter."""
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()
    return optimizer.state[next(model.parameters())]["state1"].dtype


def plain():
    return torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64))


stable = torch.nn.Sequential(bitsandbytes.nn.StableEmbedding(100, 64), torch.nn.Linear(64, 64))
before = first_state_after_a_step(plain())
copied = first_state_after_a_step(copy.deepcopy(stable))
original = first_state_after_a_step(stable)
after = first_state_after_a_step(plain())
print(f"StableEmbedding:                                {original}")
print(f"its deep copy:                                  {copied}")
print(f"a plain nn.Embedding before it was trained:     {before}")
print(f"another plain nn.Embedding, after it was:       {after}")
assert original == torch.float32 and copied == torch.uint8
assert before == torch.uint8 and after == torch.float32
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, bitsandbytes 0.50.2, numpy 2.4.6
#   StableEmbedding:                                torch.float32
#   its deep copy:                                  torch.uint8
#   a plain nn.Embedding before it was trained:     torch.uint8
#   another plain nn.Embedding, after it was:       torch.float32
