#!/usr/bin/env bash
# bitsandbytes 0.50.2: SGD takes nesterov and dampening, and RMSprop momentum, and does nothing with them; LAMB8bit's
# steps are AdamW8bit's, and LARS8bit's are SGD8bit's, bit for bit.
#
# LAMB and LARS scale a layer's step by the ratio of its weight's norm to the step's. In 32 bits max_unorm limits that;
# in 8 bits nothing does.
# Expected: other steps, as of torch.optim.SGD and torch.optim.RMSprop; or an error.
# Why it matters: kohya's SGDNesterov8bit and timm's bnbsgd ask for nesterov=True, and large-batch recipes for LAMB.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
finding <<'PYTHON'
import bitsandbytes.optim as bnb
import torch


def trained(optimizer_class, **arguments):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(64, 256))
    optimizer = optimizer_class([parameter], lr=1e-2, **arguments)
    for _ in range(6):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameter.detach()


def say(words, one, other, expected):
    same = torch.equal(one, other)
    print(f"{words}: {'the same bits' if same else 'other steps'}")
    assert same == expected


kinds = {"bitsandbytes": (bnb.SGD32bit, bnb.RMSprop32bit), "torch": (torch.optim.SGD, torch.optim.RMSprop)}
for package, (sgd, rmsprop) in kinds.items():
    ignored = package == "bitsandbytes"
    plain = trained(sgd, momentum=0.9)
    say(f"{package}, SGD with nesterov and without", trained(sgd, momentum=0.9, nesterov=True), plain, ignored)
    say(f"{package}, SGD with dampening and without", trained(sgd, momentum=0.9, dampening=0.5), plain, ignored)
    say(f"{package}, RMSprop with momentum and without", trained(rmsprop, momentum=0.9), trained(rmsprop), ignored)

say("LAMB8bit and AdamW8bit", trained(bnb.LAMB8bit, weight_decay=0.1), trained(bnb.AdamW8bit, weight_decay=0.1), True)
say("LARS8bit and SGD8bit", trained(bnb.LARS8bit, momentum=0.9), trained(bnb.SGD8bit, momentum=0.9), True)
limited, free = (trained(bnb.LAMB32bit, max_unorm=limit) for limit in (1e-6, 1.0))
say("LAMB32bit with max_unorm of 1e-6 and of 1", limited, free, False)
PYTHON
