#!/usr/bin/env bash
# accelerate 1.15.0 with a GradScaler (fp16): steps that were skipped are reported as taken if the optimizer is fused.
#
# AcceleratedOptimizer takes a step for skipped if the scaler did not call step(). Optimizers that take the scale
# themselves (torch.optim's with fused=True, and all others with _step_supports_amp_scaling) are always called, and skip
# inside. Of five steps of which three overflow, optimizer_step_was_skipped tells none, and the schedule is at step 5.
# Expected: three skipped steps and a schedule at step 2, as with fused=False.
# Why it matters: fused kernels, also those of 8-bit optimizers, are chosen for speed; here they change the learning
# rate: the overflows with which fp16 runs begin use up the warm-up.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
finding <<'PYTHON'
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler

Accelerator(cpu=True)


def run(fused):
    """Returns of five steps, of which three overflow, how many were reported as skipped, and the final rate."""
    parameter = torch.nn.Parameter(torch.ones(4))
    # What Accelerator.prepare makes for mixed_precision="fp16", which it refuses on a CPU.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    adamw = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    optimizer = AcceleratedOptimizer(adamw, device_placement=False, scaler=scaler)
    halving = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: 0.5**step)
    scheduler = AcceleratedScheduler(halving, optimizer, split_batches=True)
    moved = skipped = 0
    for factor in (1.0, float("inf"), float("inf"), float("inf"), 1.0):
        before = parameter.detach().clone()
        scaler.scale((parameter * factor).sum()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        moved += not torch.equal(before, parameter.detach())
        skipped += optimizer.step_was_skipped
    return moved, skipped, halving.last_epoch


for fused in (False, True):
    moved, skipped, scheduled = run(fused)
    print(f"fused={fused}: of 5 steps {moved} moved the weights, {skipped} are reported as skipped; "
          f"the schedule is at step {scheduled}")
    assert moved == 2
    assert skipped == (0 if fused else 3)
    assert scheduled == (5 if fused else 2)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, accelerate 1.15.0, numpy 2.4.6
#   fused=False: of 5 steps 2 moved the weights, 3 are reported as skipped; the schedule is at step 2
#   fused=True: of 5 steps 2 moved the weights, 0 are reported as skipped; the schedule is at step 5
