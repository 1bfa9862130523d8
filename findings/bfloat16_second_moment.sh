#!/usr/bin/env bash
# torch 2.13.0: AdamW's second moment of a bfloat16 parameter does not fall. That of 8 bits (bitsandbytes 0.50.2) does.
#
# States have the parameter's dtype. Neighbouring bfloat16 values are 0.39% apart or more; beta2 = 0.999 takes off 0.1%
# in a step, and rounding puts it back. After 50 large and 3000 small gradients the second moment has the bits that it
# had after the large ones, and steps are 4.3 times too small. torchao 0.18.0's AdamW8bit does the same in tensors that
# it does not quantize (here 63x64), and came-pytorch 0.1.3's CAME, which keeps float32, after its state dict was
# loaded: Optimizer.load_state_dict casts to the parameter's dtype. With 8-bit codes the decay is in the float32 scales.
# Expected: 16 bits are at least as exact as 8, and a resumed run goes on like one that was not stopped.
# Why it matters: comparisons of 8-bit states with "full" ones are often made in bfloat16.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" \
    torch==2.13.0 bitsandbytes==0.50.2 torchao==0.18.0 came-pytorch==0.1.3 numpy==2.4.6 setuptools==84.2.1
finding <<'PYTHON'
import bitsandbytes
import came_pytorch
import torch
import torchao.optim


def train(parameter, optimizer, gradient, steps):
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()


def reloaded(parameter, optimizer, options):
    other = type(optimizer)([parameter], **options)
    other.load_state_dict(optimizer.state_dict())
    return other


def late_step(dtype, optimizer_class, shape=(64, 64), state=None, resume=False, **options):
    """Trains on 50 large gradients, then on 3000 small ones.

    Returns `state` after the first and after the second, and the size of a further step.
    """
    options = {"lr": 1e-3, "weight_decay": 0.0, **options}
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = optimizer_class([parameter], **options)
    train(parameter, optimizer, gradient=1.0, steps=50)
    if resume:
        optimizer = reloaded(parameter, optimizer, options)
    before = optimizer.state[parameter][state].clone() if state else None
    train(parameter, optimizer, gradient=1e-3, steps=3000)
    after = optimizer.state[parameter][state] if state else None
    with torch.no_grad():
        parameter.zero_()  # so that the parameter's own rounding hides nothing
    train(parameter, optimizer, gradient=1e-3, steps=1)
    return before, after, parameter.detach().float().abs().mean().item()


def report(name, before, after, step):
    print(f"{name}: from {before.float().mean():.4f} to {after.float().mean():.4f}, step {step:.2e}", flush=True)


before, after, exact = late_step(torch.float32, torch.optim.AdamW, state="exp_avg_sq")
report("torch AdamW, float32", before, after, exact)
assert after.mean() < 0.06 * before.mean()
for name, optimizer_class, options in (
    ("torch AdamW, bfloat16", torch.optim.AdamW, {}),
    ("torch AdamW, bfloat16, fused", torch.optim.AdamW, {"fused": True}),
    ("torchao AdamW8bit, bfloat16, 63x64", torchao.optim.AdamW8bit, {"shape": (63, 64)}),
):
    before, after, step = late_step(torch.bfloat16, optimizer_class, state="exp_avg_sq", **options)
    report(name, before, after, step)
    assert after.dtype == torch.bfloat16 and torch.equal(before, after) and 4.2 < exact / step < 4.5
_, _, step = late_step(torch.bfloat16, bitsandbytes.optim.AdamW8bit)
print(f"bitsandbytes AdamW8bit, bfloat16: step {step:.2e}")
assert abs(step - exact) < 0.05 * exact

for resume in (False, True):
    before, after, step = late_step(torch.bfloat16, came_pytorch.CAME, state="exp_avg_sq_row", resume=resume)
    report(f"CAME, bfloat16, {'resumed' if resume else 'in one go'}, {after.dtype}", before, after, step)
    assert torch.equal(before, after) == resume
    assert after.dtype == (torch.bfloat16 if resume else torch.float32)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, bitsandbytes 0.50.2, torchao 0.18.0, came-pytorch 0.1.3, numpy 2.4.6,
#     setuptools 84.2.1
#   torch AdamW, float32: from 0.0488 to 0.0024, step 1.98e-05
#   torch AdamW, bfloat16: from 0.0491 to 0.0491, step 4.56e-06
#   torch AdamW, bfloat16, fused: from 0.0491 to 0.0491, step 4.56e-06
#   torchao AdamW8bit, bfloat16, 63x64: from 0.0491 to 0.0491, step 4.56e-06
#   bitsandbytes AdamW8bit, bfloat16: step 1.98e-05
#   CAME, bfloat16, in one go, torch.float32: from 0.0488 to 0.0024, step 8.09e-04
#   CAME, bfloat16, resumed, torch.bfloat16: from 0.0488 to 0.0488, step 1.63e-04
