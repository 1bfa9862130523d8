"""What time and memory does ``opt8bit compress`` take for models of 7, 70 and 180 billion parameters?

    pip install ".[compress]"
    OMP_NUM_THREADS=1 python benchmarks/large_models.py [--smollm2-seconds SECONDS]

Models of one block, of several widths and with random weights, are compressed on one core by the default recipe. The
seconds of each part of it, such as the sums over tokens, are divided by how often that part does its least operation:
a number that should not depend on the width, and the first table has it for every run. What is told of other models is
the sum over the parts, each with the one constant that all runs together have. Two shapes that have no share in the
constants are compressed, too, from a checkpoint's files and in a process of their own, and what is told of them is
printed beside what they took. Not counted are the reading of the model, logits behind its last block, and the
verification of what was written, which ``--no-verify`` leaves out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cost_model import (
    BYTES,
    GROUP,
    HEAD,
    PARTS,
    Costs,
    Run,
    Shape,
    Stopwatch,
    Text,
    falcon,
    llama,
    memory,
    narrow,
    work_folder,
)
from measuring import arguments, write_rows

from opt8bit import ptq

COMMAND = Text(64, held_out=8)  # as the command has it
SMOLLM2 = llama("SmolLM2-135M", 576, 1536, 9, 3, 64, blocks=30, vocabulary=49152)
LARGE = (
    llama("LLaMA-2-7B", 4096, 11008, 32, 32, 128, blocks=32, vocabulary=32000),
    llama("LLaMA-2-70B", 8192, 28672, 64, 8, 128, blocks=80, vocabulary=32000),
    falcon("Falcon-180B", 14848, 232, 8, 64, blocks=80, vocabulary=65024),
)
MEASURED = (
    (narrow(512, 1408), "bfloat16", Text(16)),
    (narrow(1024, 2816), "bfloat16", Text(16)),
    (narrow(1536, 4096), "bfloat16", Text(16)),
    (narrow(256, 8192), "bfloat16", Text(8)),  # the last layer's inputs as many as in large models
    (narrow(1024, 2816), "float32", Text(16)),
    (narrow(512, 1408), "float16", Text(8)),
)
CHECKED = (
    (llama("SmolLM2-135M", 576, 1536, 9, 3, 64, blocks=2), "float32", Text(64)),
    (narrow(768, 6144), "bfloat16", Text(16)),
)
QUICK_MEASURED = tuple((narrow(64 * i, 128 * i), dtype, Text(2, 32)) for i in (1, 2) for dtype in BYTES)
QUICK_CHECKED = ((narrow(128, 192), "bfloat16", Text(2, 32)),)


def measure(shape: Shape, dtype: str, text: Text) -> Run:
    model, watch = random_model(shape, dtype), Stopwatch()
    with watch.on_parts():
        ptq.compress(model, token_ids(shape, text), group_size=GROUP)
    return Run(shape, dtype, text, dict(watch.seconds))


def random_model(shape: Shape, dtype: str) -> Any:
    """Of LLaMA's type."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.stages[-1].inputs,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.queries // HEAD,
        num_key_value_heads=(shape.stages[0].outputs - shape.queries) // 2 // HEAD,
        head_dim=HEAD,
        vocab_size=shape.vocabulary,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(getattr(torch, dtype)).eval()


def token_ids(shape: Shape, text: Text) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (text.samples, text.length), generator=generator)


def check(shape: Shape, dtype: str, text: Text, costs: Costs) -> dict[str, Any]:
    """What is told beside what is found."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(shape, dtype).save_pretrained(folder)
        # A process of its own: the peak of its memory is that since its start.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(found, Path(folder), token_ids(shape, text)).result()
    told = {
        "seconds": sum(costs.seconds(shape, text, dtype).values()),
        "memory_bytes": memory(shape, text, dtype),
        "work_bytes": work_folder(shape, text, dtype, streams=1),
    }
    print(f"\n{shape.name}, {shape.blocks} blocks, {dtype}, {text.learned:,} tokens")
    for name, value in told.items():
        difference = value / measured[name] - 1
        print(f"  {name:<13} told {value:16,.1f}  measured {measured[name]:16,.1f}  {difference:+.0%}", flush=True)
    return {"question": "check", **about(shape, dtype, text), "told": told, "measured": measured}


def found(folder: Path, ids: torch.Tensor) -> dict[str, float]:
    """In a process that does nothing else. Memory is what comes to that of the imports."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    before, started = status("VmRSS"), time.perf_counter()
    ptq.compress(ptq.Checkpoint(folder), ids, group_size=GROUP, work=folder / "work")
    seconds, work = time.perf_counter() - started, sum(file.stat().st_size for file in (folder / "work").iterdir())
    return {"seconds": seconds, "memory_bytes": status("VmHWM") - before, "work_bytes": work}


def status(key: str) -> int:
    """Bytes that Linux has for this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def whole_command(measured: float | None, costs: Costs) -> dict[str, Any]:
    """What is told of SmolLM2-135M, beside what it took, if that is known."""
    told = sum(costs.seconds(SMOLLM2, COMMAND, "float32").values())
    beside = f"  measured {measured:,.0f}  {told / measured - 1:+.0%}" if measured else ""
    print(f"\n{SMOLLM2.name}, the whole command, float32\n  seconds       told {told:,.0f}{beside}")
    seconds = {"told": {"seconds": told}, "measured": {"seconds": measured}}
    return {"question": "whole command", **about(SMOLLM2, "float32", COMMAND), **seconds}


def predict(shape: Shape, text: Text, costs: Costs) -> dict[str, Any]:
    hours = {dtype: sum(costs.seconds(shape, text, dtype).values()) / 3600 for dtype in BYTES}
    parts = costs.seconds(shape, text, "bfloat16")
    most = max(parts, key=lambda name: parts[name])
    held, kept = memory(shape, text, "bfloat16"), work_folder(shape, text, "bfloat16")
    print(
        f"{shape.name:<13}{shape.blocks * shape.weights / 1e9:8.1f}e9{hours['bfloat16']:9,.1f} h"
        f"{hours['float16']:9,.1f} h{held / 1e9:8,.1f} GB{kept / 1e9:10,.1f} GB   "
        f"{most}, {parts[most] / sum(parts.values()):.0%}"
    )
    told = {"hours": hours, "bfloat16_seconds": parts, "memory_bytes": held, "work_bytes": kept}
    return {"question": "prediction", **about(shape, "bfloat16", text), **told}


def about(shape: Shape, dtype: str, text: Text) -> dict[str, Any]:
    return {"model": shape.name, "shape": asdict(shape), "dtype": dtype, "text": asdict(text)}


def print_constants(costs: Costs) -> None:
    names = [run.shape.name for run in costs.runs] + ["all", "all", "all"]
    dtypes = [run.dtype for run in costs.runs] + list(BYTES)
    print(f"{'picoseconds of one':<28}" + "".join(f"{name:>10}" for name in names))
    print(f"{'':<28}" + "".join(f"{dtype:>10}" for dtype in dtypes))
    for name, part in PARTS.items():
        constants = [run.constant(name) for run in costs.runs] + [costs.constant(name, dtype) for dtype in BYTES]
        print(f"{name:<20}{part.unit:<8}" + "".join(f"{constant * 1e12:10,.1f}" for constant in constants))
    print(f"{'seconds':<28}" + "".join(f"{sum(run.seconds.values()):10,.1f}" for run in costs.runs), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2-seconds", type=float, help="that the command took for SmolLM2-135M on one core")
    torch.set_num_threads(1)
    options = arguments(parser, "large_models")
    measured, checked = (QUICK_MEASURED, QUICK_CHECKED) if options.quick else (MEASURED, CHECKED)
    costs = Costs([measure(*each) for each in measured])
    print_constants(costs)
    rows = [{"question": "run", **about(*run[:3]), "seconds": run.seconds} for run in costs.runs]
    rows += [check(*each, costs) for each in checked]
    rows.append(whole_command(options.smollm2_seconds, costs))
    print(f"\n{'':<13}{'weights':>10}{'bfloat16':>11}{'float16':>11}{'memory':>11}{'work folder':>13}   most time")
    rows += [predict(shape, COMMAND, costs) for shape in LARGE]
    write_rows(options.rows, rows)
    print(f"\nRows: {options.rows}")


if __name__ == "__main__":
    main()
