"""How long does an AdamW step take on a GPU, against torch, the other 8-bit optimizers, and the speed of the memory?

    pip install ".[bench,demo]" && python benchmarks/gpu_step.py

First a step of ours is held against the reference, in plain torch on the CPU: nothing is measured where they differ by
more than rounding. Then each question alternates all optimizers, round by round, on the same parameters and on fresh
random gradients, by the device's own clock, launching included, with caches flushed; ratios are of medians, to torch's
fused optimizer, whose states have the parameters' dtype. The bandwidth counts what an 8-bit step has to move, 4 bytes
of codes and three times those of a parameter, and is set against that of a copy. Optimizers that are not installed, and
sizes that the device has no room for, are left out. Writes one JSON line per row, and a plot.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_step import GPT2_SMALL, adamw_peers
from measuring import arguments, copy_bandwidth, plot, seconds, write_rows
from torch import nn

import opt8bit

LAYER_OF_7B = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008), (4096,), (4096,)]
OURS, BASE = "opt8bit.AdamW8bit", "torch.optim.AdamW fused"
CODE_BYTES = 4  # of two states, read and written
ROOM = 3  # a question needs this many times the bytes of its parameters, gradients and 32-bit states


def questions(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    """Parameter shapes, by name."""
    sizes = [10**5] if quick else [10**exponent for exponent in range(5, 10)]
    single = {f"{size:.0e} parameters": [(size // 1000, 1000)] for size in sizes}
    return single if quick else {**single, "GPT-2 small": GPT2_SMALL, "a layer of a 7B model": LAYER_OF_7B}


def seconds_on(device: torch.device, call: Callable[[], Any]) -> float:
    """What the device takes for a call, or, on a CPU, what passes by the clock."""
    if device.type == "cpu":
        return seconds(call)
    module = getattr(torch, device.type)
    torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # so that no cache holds what the last call left
    module.synchronize()  # or the host would prepare the call while the device is still at this
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    module.synchronize()
    return begin.elapsed_time(end) / 1e3


def check(device: torch.device) -> None:
    """Ends the program where a step on the device is not that of the reference."""
    values = fresh([(512, 1000), (64, 64), (7,)], torch.float32, device)
    states = []
    for place, fused in ((device, None), (torch.device("cpu"), False)):
        params = [nn.Parameter(value.detach().to(place, copy=True)) for value in values]
        for param, value in zip(params, values, strict=True):
            assert value.grad is not None
            param.grad = value.grad.to(place)
        optimizer = opt8bit.AdamW8bit(params, fused=fused)
        optimizer.step()
        states.append([{name: value.cpu() for name, value in optimizer.state[param].items()} for param in params])
    for mine, expected in zip(*states, strict=True):
        for name, value in expected.items():
            if value.dtype == torch.uint8:  # codes, counted from zero modulo 256
                distance = (mine[name] - value).view(torch.int8).double().abs()
                if distance.max() > 1 or (distance > 0).double().mean() > 1e-3:
                    raise SystemExit(f"{name} differs from the reference in {int((distance > 0).sum())} codes")
            elif not torch.allclose(mine[name], value, rtol=1e-5):
                distance = (mine[name] - value).abs().max()
                raise SystemExit(f"{name} differs from the reference by up to {distance:.1e}")
    print("a step is that of the reference")


def fresh(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def compare(
    question: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device, rounds: int, copy: float
) -> list[dict[str, Any]]:
    """Steps the optimizers in turn, prints a table and returns its rows."""
    params = fresh(shapes, dtype, device)
    count = sum(param.numel() for param in params)
    optimizers = {name: make(params) for name, make in adamw_peers().items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):  # two to warm up
        for name, optimizer in optimizers.items():
            for param in params:
                assert param.grad is not None
                param.grad.normal_()
            passed = seconds_on(device, optimizer.step) * 1e3
            if turn >= 2:
                times[name].append(passed)
    print(f"\n{question}, {str(dtype).removeprefix('torch.')}: {count / 1e6:.1f}M parameters, {rounds} rounds")
    base = statistics.median(times[BASE])
    rows = []
    for name, sample in times.items():
        median = statistics.median(sample)
        moved = (CODE_BYTES + 3 * dtype.itemsize) * count / (median / 1e3) if name == OURS else None
        row = {
            "question": question,
            "dtype": str(dtype),
            "optimizer": name,
            "parameters": count,
            "median_ms": median,
            "min_ms": min(sample),
            "max_ms": max(sample),
            "ratio": median / base,
            "bytes_per_s": moved,
            "share_of_copy": moved and moved / copy,
        }
        rows.append(row)
        bandwidth = f"  {moved / 1e9:8.1f} GB/s, {moved / copy:.0%} of a copy" if moved else ""
        print(f"  {name:<28} {median:9.3f} ms  {row['ratio']:6.2f}x{bandwidth}", flush=True)
    return rows


def fits(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    count = sum(torch.Size(shape).numel() for shape in shapes)
    gc.collect()  # the optimizers of the last question
    getattr(torch, device.type).empty_cache()
    free, _ = getattr(torch, device.type).mem_get_info(device)
    return ROOM * count * (2 * dtype.itemsize + 8) < free


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Nanoseconds a parameter, over the number of parameters."""
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    with plot(path, len(dtypes), width=6, height=4) as axes:
        for axis, dtype in zip(axes, dtypes, strict=False):
            for name in dict.fromkeys(row["optimizer"] for row in rows):
                chosen = [row for row in rows if row["optimizer"] == name and row["dtype"] == dtype]
                points = sorted((row["parameters"], row["median_ms"] * 1e6 / row["parameters"]) for row in chosen)
                axis.loglog(*zip(*points, strict=True), marker="o", label=name)
            axis.set(title=dtype, xlabel="parameters", ylabel="ns per parameter")
            axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, xpu, or cpu to try this script (default cuda)")
    parser.add_argument("--rounds", type=int, default=31, help="times that each optimizer steps (default 31)")
    options = arguments(parser, "gpu_step")
    device = torch.device(options.device)
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        parser.error(f"there is no device {device}")
    module = getattr(torch, device.type)
    name = "cpu" if device.type == "cpu" else module.get_device_name(device)
    print(name)
    check(device)
    rounds = 3 if options.quick else options.rounds
    copy = copy_bandwidth(device, functools.partial(seconds_on, device))
    print(f"copy: {copy / 1e9:.1f} GB/s")
    rows = []
    for question, shapes in questions(options.quick).items():
        for dtype in (torch.float32, torch.bfloat16):
            if fits(shapes, dtype, device):
                rows += compare(question, shapes, dtype, device, rounds, copy)
            else:
                print(f"\n{question}, {dtype}: no room for it")
    write_rows(options.rows, rows, copy_bytes_per_s=copy, device=name)
    draw(rows, options.rows)


if __name__ == "__main__":
    main()
