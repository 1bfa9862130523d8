"""Compiles kernels in Triton for a GPU that need not be there, those of AdamW for every storage.

python compiling.py BACKEND ARCHITECTURE WARP_SIZE RULE ...
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opt8bit.backends import Batch, Rule
from opt8bit.backends.triton import launches
from opt8bit.backends.triton.launches import OPTIONS, Launches
from opt8bit.optim import adagrad, adam, ademamix, lamb, lars, lion, rmsprop, sgd
from opt8bit.optim.states import CODEBOOKS
from opt8bit.quant import block_view

RULES = [
    *adam.RULES.values(),
    *sgd.RULES.values(),
    *rmsprop.RULES.values(),
    *lars.RULES.values(),
    *(module.RULE for module in (adagrad, lion, ademamix, lamb)),
]
POINTERS = {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32", torch.float64: "*fp64"}


def compile_for(target: GPUTarget) -> Any:
    def run(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
        signature, constexprs, aligned = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name], aligned[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif parameter.is_constexpr or value is None:
                signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = "i32"
        source = ASTSource(kernel, signature, constexprs, aligned)
        triton.compile(source, target=target, options={"num_warps": warps, **OPTIONS})

    return run


def batch(rule: Rule, dtype: torch.dtype, rounding: str, coded: bool) -> Batch:
    views = [block_view(shape, 256) for shape in ((64, 256), (64, 100))]
    extents = torch.tensor([(view.rows, view.row_length) for view in views]).numpy()
    books = [CODEBOOKS[signed] for signed in rule.states.values()]
    numbers, firsts = torch.arange(2).numpy(), torch.zeros(2, dtype=torch.int64).numpy()
    return Batch(rule, 256, rounding, 0, dtype, coded, False, numbers, firsts, views, extents, books)


backend, architecture, warp_size, *names = sys.argv[1:]
target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp_size))
compile_one = compile_for(target)
launches._warm_up = compile_one
stored = [(torch.bfloat16, way, True) for way in ("nearest", "stochastic", "compensated")]
stored += [(torch.float16, "nearest", True), (torch.float32, "nearest", False)]
adamw = next(rule for rule in RULES if rule.name == "adamw")
plain = [(rule, torch.float32, "nearest", True) for rule in RULES if rule.name in names]
for each in [*plain, *((adamw, *kind) for kind in stored)]:
    held = Launches(batch(*each), torch.device("cpu"))
    scale = torch.ones(1)
    held._compile(held._cut(torch.zeros(2, dtype=torch.bool).numpy()), scale, scale, scale)
