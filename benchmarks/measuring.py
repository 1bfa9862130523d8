"""What the benchmarks share: alternating calls, the machine, and rows of figures."""

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
from torch import nn

from opt8bit.backends import backend_for


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


def parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def copy_bandwidth(
    device: torch.device | str = "cpu", seconds: Callable[[Callable[[], Any]], float] = seconds
) -> float:
    """Bytes read and written per second by a copy that no cache holds; ``seconds`` times a call."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    median = statistics.median(seconds(lambda: target.copy_(source)) for _ in range(9))
    return 2 * source.numel() * source.element_size() / median


def machine() -> dict[str, Any]:
    packages = ("opt8bit", "torch", "triton", "numpy", "transformers", "bitsandbytes", "torchao")
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


def write_rows(path: Path, rows: Iterable[dict[str, Any]], **about: Any) -> None:
    """One JSON line for each, with what they have in common and the machine behind it."""
    common = {**about, **machine()}
    path.write_text("".join(json.dumps({**row, **common}) + "\n" for row in rows))


def compare(
    question: str, optimizers: dict[str, torch.optim.Optimizer], rounds: int, slow_rounds: int = 3
) -> list[dict[str, Any]]:
    """Steps the optimizers in turn, prints a table, and returns its rows; ratios are to the first of them."""
    times = alternate({name: optimizer.step for name, optimizer in optimizers.items()}, rounds, slow_rounds)
    base = statistics.median(next(iter(times.values())))
    rows = []
    tensors = [param for group in next(iter(optimizers.values())).param_groups for param in group["params"]]
    count = sum(tensor.numel() for tensor in tensors)
    print(f"\n{question}: {len(tensors)} tensors, {count / 1e6:.1f}M parameters, {rounds} rounds")
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
            f"  {name:<44} {row['median_ms']:9.2f} ms ({row['min_ms']:.2f} to {row['max_ms']:.2f})"
            f"  {median / count * 1e9:7.3f} ns/parameter  {row['ratio']:7.2f}x",
            flush=True,
        )
    return rows


def main(description: str | None, rows_file: str, measure: Callable[[int, bool], list[dict[str, Any]]]) -> None:
    """The command line of a benchmark; ``measure`` takes rounds, and whether to be quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tensors, to see that it runs")
    parser.add_argument("--rounds", type=int, default=31, help="times that each optimizer steps (default 31)")
    parser.add_argument("--rows", type=Path, default=Path(rows_file), help="where to write the rows")
    options = parser.parse_args()
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, kernels {about['kernels']}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items() if version))
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    rows = measure(3 if options.quick else options.rounds, options.quick)
    write_rows(options.rows, rows, copy_bytes_per_s=bandwidth)
    print(f"\nRows: {options.rows}")
