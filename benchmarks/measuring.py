"""What the benchmarks share: alternating calls, the machine, and rows of figures."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import Elsewhere, imported
from torch import nn

from opt8bit.backends import backend_for


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(clocks: dict[str, Callable[[], float]], rounds: int, slow_rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, after two that do not count; what takes four times as long as the first is called in
    ``slow_rounds`` of them, evenly spread."""
    for clock in clocks.values():
        clock()
    warm = {name: clock() for name, clock in clocks.items()}
    first = next(iter(warm.values()))
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for turn in range(rounds):
        for name, clock in clocks.items():
            if warm[name] < 4 * first or turn % max(1, rounds // slow_rounds) == 0:
                times[name].append(clock())
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def complete(
    path: Path,
    wanted: Iterable[dict[str, Any]],
    measure: Callable[..., list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Measures what has no row yet: a run that was stopped goes on where it was. What it was measured on is in the row.

    ``measure(**about)`` returns the figures for one of ``wanted``, and rows of both are added to the file at once.
    Returns those rows of the file that were wanted.
    """
    rows = read_rows(path)
    asked = list(wanted)
    missing = [about for about in asked if not any(about.items() <= row.items() for row in rows)]
    if len(missing) < len(asked):
        print(f"{len(asked) - len(missing)} of {len(asked)} are in {path} and not measured again", flush=True)
    for about in missing:
        started = time.perf_counter()
        found = measure(**about)
        common = {"took_seconds": time.perf_counter() - started, **machine()}
        new = [{**about, **figures, **common} for figures in found]
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
        rows += new
    return [row for about in asked for row in rows if about.items() <= row.items()]


def show_machine() -> None:
    """Prints the machine and the versions."""
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, kernels {about['kernels']}")
    print(", ".join(f"{package} {version}" for package, version in about["versions"].items() if version), flush=True)


def arguments(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Adds ``--quick`` and ``--rows`` and parses; quick rows go to a new folder unless told otherwise."""
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--rows", type=Path, help=f"where rows go (default {name}.jsonl); the plot goes beside it")
    options = parser.parse_args()
    if options.rows is None:
        options.rows = Path(tempfile.mkdtemp() if options.quick else "") / f"{name}.jsonl"
    show_machine()
    return options


@contextmanager
def plot(rows: Path, panels: int, width: float = 4.5, height: float = 3.2) -> Iterator[list[Any]]:
    """The axes of so many panels, saved beside the rows as a picture; none where matplotlib is not installed."""
    pyplot: Any = imported("matplotlib.pyplot")
    if pyplot is None or not panels:
        yield []
        return
    figure, axes = pyplot.subplots(1, panels, figsize=(width * panels, height), squeeze=False)
    yield list(axes[0])
    figure.tight_layout()
    figure.savefig(rows.with_suffix(".png"), dpi=80)
    print(f"\nRows: {rows}; plot: {rows.with_suffix('.png')}")


def compare(
    optimizers: Mapping[str, torch.optim.Optimizer | Elsewhere], rounds: int, slow_rounds: int = 3
) -> list[dict[str, Any]]:
    """Steps optimizers in turn, prints a table and returns its rows; ratios are of medians, to the first of them."""

    def clock(optimizer: Any) -> Callable[[], float]:
        return optimizer.step_seconds if isinstance(optimizer, Elsewhere) else partial(seconds, optimizer.step)

    times = alternate({name: clock(each) for name, each in optimizers.items()}, rounds, slow_rounds)
    base = statistics.median(next(iter(times.values())))
    bandwidth = copy_bandwidth()
    print(f"  copy: {bandwidth / 1e9:.1f} GB/s")
    rows = []
    for name, sample in times.items():
        median = statistics.median(sample)
        row = {
            "optimizer": name,
            "copy_bytes_per_s": bandwidth,
            "median_ms": median * 1e3,
            "min_ms": min(sample) * 1e3,
            "max_ms": max(sample) * 1e3,
            "rounds": len(sample),
            "ratio": median / base,
        }
        rows.append(row)
        spread = f"({row['min_ms']:.3f} to {row['max_ms']:.3f})"
        print(f"  {name:<44} {row['median_ms']:10.3f} ms  {spread:<24} {row['ratio']:7.2f}x", flush=True)
    return rows


def peak_bytes() -> int:
    """The most memory that this process has had. (What getrusage tells begins with the most that its parent had.)"""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_ratios(title: str, rows: list[dict[str, Any]]) -> None:
    """A line for each question: milliseconds of its first optimizer, and the ratios of the others to it."""
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    print(f"\n{title}\n{'':<20}{names[0] + ', ms':>28}" + "".join(f"{name:>{len(name) + 2}}" for name in names[1:]))
    for question in dict.fromkeys(row["question"] for row in rows):
        found = {row["optimizer"]: row for row in rows if row["question"] == question}
        ratios = [
            f"{found[name]['ratio']:>{len(name) + 1}.2f}x" if name in found else " " * (len(name) + 2)
            for name in names[1:]
        ]
        print(f"{question:<20}{found[names[0]]['median_ms']:>28.3f}" + "".join(ratios))
