"""How long does an optimizer step take on the CPU, against torch and the other 8-bit optimizers?

    pip install ".[bench]" && python benchmarks/cpu_step.py

Each question alternates all optimizers in one process, round by round, on their own copies of the same float32
parameters and gradients, and reports medians and ratios of medians to torch's fused optimizer. Peers that are not
installed are left out. Writes one JSON line per row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.backends import backend_for

Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
GPT2_SMALL = [
    (50257, 768),
    (1024, 768),
    *[
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    * 12,
    (768,),
    (768,),
]


def questions(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    """Parameter shapes, by name."""
    if quick:
        return {"one 256x256": [(256, 256)], "20 of 64x64": [(64, 64)] * 20}
    return {
        "one 4096x4096": [(4096, 4096)],
        "GPT-2 small": GPT2_SMALL,
        "1,000 of 64x64": [(64, 64)] * 1000,
    }


def adamw_peers() -> dict[str, Maker]:
    peers: dict[str, Maker] = {
        "torch.optim.AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        "opt8bit.AdamW8bit": lambda params: opt8bit.AdamW8bit(params, lr=1e-3),
        "torch.optim.AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    }
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        peers["bitsandbytes.AdamW8bit"] = lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-3)
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit  # pyright: ignore[reportMissingImports]

        peers["torchao.AdamW8bit"] = lambda params: TorchaoAdamW8bit(params, lr=1e-3)
    except ImportError:
        pass
    return peers


def sgd_peers() -> dict[str, Maker]:
    return {
        "torch.optim.SGD fused": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
        "opt8bit.SGD8bit": lambda params: opt8bit.SGD8bit(params, lr=1e-3, momentum=0.9),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(calls: dict[str, Callable[[], Any]], rounds: int, slow_rounds: int) -> dict[str, list[float]]:
    """Times of each call, in turn. The first is not counted; one ten times slower than the first call gets fewer."""
    for call in calls.values():
        call()
    warm = {name: seconds(call) for name, call in calls.items()}
    first = next(iter(warm.values()))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn < slow_rounds or warm[name] < 10 * first:
                times[name].append(seconds(call))
    return times


def parameters(shapes: Iterable[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    target.copy_(source)
    best = statistics.median(seconds(lambda: target.copy_(source)) for _ in range(9))
    return 2 * source.numel() * source.element_size() / best


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel())


def machine() -> dict[str, Any]:
    packages = ("opt8bit", "torch", "numpy", "bitsandbytes", "torchao")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "kernels": backend_for("cpu").name,
        "python": platform.python_version(),
        "versions": versions,
    }


def measure(rounds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    asked = [(f"AdamW, {name}", shapes, adamw_peers()) for name, shapes in questions(quick).items()]
    asked.append(("SGD with momentum, " + asked[0][0].split(", ")[1], asked[0][1], sgd_peers()))
    for question, shapes, peers in asked:
        optimizers = {name: make(parameters(shapes)) for name, make in peers.items()}
        times = alternate({name: optimizer.step for name, optimizer in optimizers.items()}, rounds, 3)
        base = statistics.median(next(iter(times.values())))
        count = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"\n{question}: {len(shapes)} tensors, {count / 1e6:.1f}M parameters, {rounds} rounds")
        for name, sample in times.items():
            median = statistics.median(sample)
            row = {
                "question": question,
                "optimizer": name,
                "parameters": count,
                "median_ms": median * 1e3,
                "min_ms": min(sample) * 1e3,
                "max_ms": max(sample) * 1e3,
                "ratio": median / base,
            }
            rows.append(row)
            print(
                f"  {name:<26} {row['median_ms']:9.2f} ms ({row['min_ms']:.2f} to {row['max_ms']:.2f})"
                f"  {median / count * 1e9:7.3f} ns/parameter  {row['ratio']:7.2f}x"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tensors, to see that it runs")
    parser.add_argument("--rounds", type=int, default=31, help="times that each optimizer steps (default 31)")
    parser.add_argument("--rows", type=Path, default=Path("cpu_step.jsonl"), help="where to write the rows")
    options = parser.parse_args()
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, kernels {about['kernels']}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items() if version))
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    rows = measure(3 if options.quick else options.rounds, options.quick)
    with options.rows.open("w") as file:
        for row in rows:
            file.write(json.dumps({**row, "copy_bytes_per_s": bandwidth, **about}) + "\n")
    print(f"\nRows: {options.rows}")


if __name__ == "__main__":
    main()
