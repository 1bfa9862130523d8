"""Steps optimizers on a GPU that need not be there: Triton compiles for it, and launches are recorded, not made.

python recording.py BACKEND ARCHITECTURE WARP_SIZE CASE ...

Everything is as on the device, from the arguments' types to the code it would run, but that nothing is computed.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget

from opt8bit import backends
from opt8bit.quant import decode_state, dequantize_blockwise, dynamic_map, encode_state, quantize_blockwise

sys.path.append(str(Path(__file__).parents[1] / "optim"))
from cases import CASES

SHAPES = ((64, 100), (7,))  # rows of blocks that are cut short, and states of 32 bits
ALIGNED = (64, 256)
ADAMW = "AdamW8bit weight decay"
STORED = [  # of AdamW
    *((torch.bfloat16, options) for options in ({}, {"stochastic_rounding": True}, {"compensation": True})),
    (torch.float16, {}),
    (torch.float32, {"state_bits": 32}),
]


class Driver:
    """Of a device that has one stream and does nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 65536},
        )
        self.compiled: list[str] = []
        self.launched: list[tuple[str, int]] = []  # kernels and their programs

    def _load(self, name: str, code: bytes, *about: Any) -> tuple[Any, ...]:
        assert code[:4] == b"\x7fELF", f"{name} is no code of a GPU"
        self.compiled.append(name)
        return object(), object(), 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda programs, *about: self.launched.append((source.fn.__name__, programs))


def train(
    driver: Driver, case: str, shapes: Any, dtype: torch.dtype, *, is_scaled: bool = False, **options: Any
) -> list[list[tuple[str, int]]]:
    """What each of three steps launches, with what GradScaler hands over or without."""
    make, _, hyper = CASES[case]
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    optimizer: Any = make(params, **{**hyper, **options})
    if is_scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)
    for param in params:
        param.grad = torch.ones_like(param)
    steps = []
    for turn in range(3):
        driver.launched, compiled = [], len(driver.compiled)
        optimizer.step()
        assert turn == 0 or len(driver.compiled) == compiled, "a step like the last one compiled a kernel"
        steps.append(driver.launched)
    return steps


def main(backend: str, architecture: str, warp_size: str, *cases: str) -> None:
    driver: Any = Driver(
        GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp_size))
    )
    triton.runtime.driver.set_active(driver)
    backends.is_interpreting = lambda: True  # so that Triton serves the CPU's tensors
    for case in cases:
        steps = train(driver, case, SHAPES, torch.float32)
        assert steps[0] and all(step == steps[0] for step in steps), steps
    for dtype, options in STORED:
        assert train(driver, ADAMW, [ALIGNED, *SHAPES], dtype, is_scaled=True, **options)[0]
    few, many = (train(driver, ADAMW, [(64, 64)] * count, torch.float32)[1] for count in (10, 1000))
    assert [name for name, _ in few] == [name for name, _ in many] == ["constants_kernel", "step_kernel"]
    assert [programs for _, programs in many] == [100 * programs for _, programs in few]
    driver.launched = []
    codes = quantize_blockwise(torch.randn(64, 100), dynamic_map(), 256)
    dequantize_blockwise(*codes, dynamic_map(), 256)
    assert [name for name, _ in driver.launched] == ["quantize_kernel", "dequantize_kernel"]
    for signed in (True, False):
        driver.launched = []
        decode_state(*encode_state(torch.randn(64, 100), signed, 256), signed, 256)
        assert [name for name, _ in driver.launched] == ["encode_state_kernel", "dequantize_kernel"]


main(*sys.argv[1:])
