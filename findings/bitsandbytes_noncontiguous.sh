#!/usr/bin/env bash
# bitsandbytes 0.50.2: a step moves parameters that are not contiguous to new memory, in another layout.
#
# The optimizer replaces such a parameter's data by a contiguous copy. A head that is a transposed view of the embedding
# is untied by the first step, and a convolution in channels_last is in the default layout after it.
# Expected: parameters are updated in place, as by torch.optim.AdamW.
# Why it matters: one optimizer is to be exchanged for the other by changing a name. Here the model then has one weight
# more, or runs slower, and nothing is raised.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
finding <<'PYTHON'
import bitsandbytes
import torch


def still_tied(optimizer_class):
    embedding = torch.nn.Parameter(torch.randn(64, 128))
    head = torch.nn.Parameter(embedding.detach().t())
    head.grad = torch.ones_like(head)
    optimizer_class([head], lr=1e-2).step()
    return torch.equal(head, embedding.t())


def still_channels_last(optimizer_class):
    convolution = torch.nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)
    convolution(torch.randn(1, 64, 8, 8)).sum().backward()
    optimizer_class(convolution.parameters(), lr=1e-2).step()
    return convolution.weight.is_contiguous(memory_format=torch.channels_last)


for optimizer_class, kept in ((torch.optim.AdamW, True), (bitsandbytes.optim.AdamW8bit, False)):
    tied, channels_last = still_tied(optimizer_class), still_channels_last(optimizer_class)
    print(f"after a step of {optimizer_class.__name__}: tied {tied}, channels_last {channels_last}")
    assert tied == kept and channels_last == kept
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, bitsandbytes 0.50.2, numpy 2.4.6
#   after a step of AdamW: tied True, channels_last True
#   after a step of AdamW8bit: tied False, channels_last False
