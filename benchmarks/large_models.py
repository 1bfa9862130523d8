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
import json
import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from measuring import machine
from torch import nn
from torch.nn import functional

from opt8bit import ptq
from opt8bit.ptq import layer, pipeline
from opt8bit.ptq.compress import DEFAULT_METHOD
from opt8bit.ptq.methods import gptq, quantease
from opt8bit.ptq.methods.kernels import LayerKernels
from opt8bit.ptq.outputs import OutputErrors
from opt8bit.ptq.statistics import Statistics
from opt8bit.ptq.walk import Walk

GROUP, HEAD = 64, 64  # weights that share a scale; features of a head of the models that are measured
REFITS, SWEEPS = DEFAULT_METHOD.refits, DEFAULT_METHOD.sweeps * (1 + DEFAULT_METHOD.refits)
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Stage:
    """Layers of a block that read one tensor."""

    outputs: int  # of all of them
    inputs: int
    writes: bool = False  # to the hidden states, whose drift is in the sums then, too

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Shape:
    """What a model's costs depend on."""

    name: str
    hidden: int
    queries: int  # features of all heads
    stages: tuple[Stage, ...]
    held: int  # features of a token that are in memory where a pass halts with most of them
    blocks: int = 1
    vocabulary: int = 512

    def each(self, count: Callable[[Stage], float]) -> float:
        """A sum over the stages of a block."""
        return sum(count(stage) for stage in self.stages)

    @property
    def weights(self) -> float:
        """Of a block."""
        return self.each(lambda s: s.weights)

    @property
    def outputs(self) -> float:
        """Of all layers of a block."""
        return self.each(lambda s: s.outputs)


def llama(name: str, hidden: int, intermediate: int, heads: int, kv_heads: int, head: int, **other: int) -> Shape:
    q, kv, writes = heads * head, kv_heads * head, True
    qkv, gate_up = Stage(q + 2 * kv, hidden), Stage(2 * intermediate, hidden)
    stages = (qkv, Stage(hidden, q, writes), gate_up, Stage(hidden, intermediate, writes))
    # Before o_proj: the block's input and its norm, queries, keys, values, and what o_proj reads.
    # Before down_proj: the block's input, the residual and its norm, and what down_proj reads.
    held = max(2 * hidden + 2 * q + 2 * kv, 3 * hidden + intermediate)
    return Shape(name, hidden, q, stages, held, **other)


def falcon(name: str, hidden: int, heads: int, kv_heads: int, head: int, **other: int) -> Shape:
    """Attention and MLP side by side, each with a norm of its own."""
    q, kv, writes = heads * head, kv_heads * head, True
    stages = (Stage(q + 2 * kv, hidden), Stage(hidden, q, writes), Stage(4 * hidden, hidden))
    stages += (Stage(hidden, 4 * hidden, writes),)
    # Before the last layer: the block's input, its two norms, what attention puts out, and what the layer reads.
    return Shape(name, hidden, q, stages, held=4 * hidden + 4 * hidden, **other)


def narrow(hidden: int, intermediate: int) -> Shape:
    return llama(f"{hidden}/{intermediate}", hidden, intermediate, hidden // HEAD, hidden // HEAD, HEAD)


@dataclass(frozen=True)
class Text:
    samples: int
    length: int = 512
    held_out: int = 0

    @property
    def learned(self) -> int:
        """Tokens to calibrate on."""
        return self.samples * self.length

    @property
    def tokens(self) -> int:
        """With those that only go through."""
        return (self.samples + self.held_out) * self.length


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


@dataclass(frozen=True)
class Part:
    """One part of the work.

    Args:
        unit: what is counted; a MAC is a multiplication and an addition.
        count: of one block.
        sites: the functions that do it; what other parts do inside them is theirs.
        in_dtype: whether its cost depends on the model's dtype.
    """

    unit: str
    count: Callable[[Shape, Text], float]
    sites: tuple[tuple[Any, str], ...]
    in_dtype: bool = False


def _sums(shape: Shape, text: Text) -> float:
    """Half of Σ x̂ x̂ᵀ, Σ x x̂ᵀ, and where there is a drift Σ δ x̂ᵀ."""
    return text.learned * shape.each(lambda s: s.inputs * (1.5 * s.inputs + shape.hidden * s.writes))


def _targets(shape: Shape, text: Text) -> float:
    """A Cholesky factor, two products, a solution by two triangles."""
    return shape.each(lambda s: s.inputs**3 / 6 + 3 * s.weights * s.inputs)


def _refits(shape: Shape, text: Text) -> float:
    """Two products, and for each row a system of as many equations as it has groups."""
    return REFITS * shape.each(lambda s: s.weights * s.inputs * (2 + s.inputs / (3 * GROUP**3)))


def _attention(shape: Shape, text: Text) -> float:
    return 2 * text.tokens * 2 * text.length * shape.queries


ATTENTION = (functional, "scaled_dot_product_attention")
PASSES, STAGES = ((Walk, "advance"), (Walk, "finish")), ((layer, "asymmetric_target"), (pipeline, "compress_stage"))
ROUNDING = ((LayerKernels, "gptq"), (LayerKernels, "coordinate_descent"))
PARTS = {  # passes go through two models
    "linear layers": Part("MAC", lambda s, t: 2 * t.tokens * s.weights, ((nn.Linear, "forward"),), in_dtype=True),
    "attention": Part("MAC", _attention, (ATTENTION,), in_dtype=True),
    "rest of the passes": Part("output", lambda s, t: 2 * t.tokens * s.outputs, PASSES, in_dtype=True),
    "errors of outputs": Part("output", lambda s, t: t.learned * s.outputs, ((OutputErrors, "compare"),), True),
    "sums over tokens": Part("MAC", _sums, ((Statistics, "update"),)),
    "targets, float64": Part("MAC", _targets, STAGES),
    "inverses, float64": Part("MAC", lambda s, t: s.each(lambda s: s.inputs**3 * 2 / 3), ((gptq, "inverse_factor"),)),
    "grids": Part("weight", lambda s, t: s.weights, ((LayerKernels, "fit"),)),
    "GPTQ and descent": Part("MAC", lambda s, t: s.each(lambda s: (0.5 + SWEEPS) * s.weights * s.inputs), ROUNDING),
    "refits of scales": Part("MAC", _refits, ((quantease, "refit_scales"),)),
    "all else": Part("weight", lambda s, t: s.weights, ((ptq, "compress"),)),
}


class Stopwatch:
    """Seconds of functions by name; what is inside another one's is not that one's."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - started
                self.seconds[name] += seconds - self._inside.pop()
                if self._inside:
                    self._inside[-1] += seconds

        return run

    @contextmanager
    def on_parts(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, part in PARTS.items():
                for owner, attribute in part.sites:
                    timed = self.timed(name, getattr(owner, attribute))
                    stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield


class Run(NamedTuple):
    shape: Shape
    dtype: str
    text: Text
    seconds: dict[str, float]  # by part

    def constant(self, name: str) -> float:
        """Seconds of one."""
        return self.seconds[name] / PARTS[name].count(self.shape, self.text)


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


class Costs:
    """What is told of any shape, from runs."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def constant(self, name: str, dtype: str) -> float:
        """Seconds of one, of all runs together: the larger a run, the more it says."""
        part = PARTS[name]
        runs = [run for run in self.runs if run.dtype == dtype or not part.in_dtype]
        return sum(run.seconds[name] for run in runs) / sum(part.count(run.shape, run.text) for run in runs)

    def seconds(self, shape: Shape, text: Text, dtype: str) -> dict[str, float]:
        """By part."""
        counts = {name: shape.blocks * part.count(shape, text) for name, part in PARTS.items()}
        return {name: count * self.constant(name, dtype) for name, count in counts.items()}


def memory(shape: Shape, text: Text, dtype: str) -> float:
    """Bytes at the worst moment: all passes stand before one stage, which has its sums and computes from them."""
    size, double = BYTES[dtype], 8
    ends = 2 * shape.vocabulary * shape.hidden * size  # embedding and output head
    block = shape.weights * (2 * size + 1 + 2 * 4 / GROUP)  # twice as it is; codes, scales and zero points
    streams = 2 * text.tokens * shape.hidden * size
    passes = text.learned * (2 * shape.held * size + 4 * shape.hidden)  # of two models; the drift

    def stage(s: Stage) -> float:
        square = double * s.inputs**2
        kept = 2 * (2 * square + double * shape.hidden * s.inputs * s.writes)  # sums, and the moments that they give
        target = 2 * square + 40 * s.weights  # damped, factor; the weights five times in float64
        inverse = 7 * square + 24 * s.weights  # ordered, reversed, damped, two factors, identity and inverse
        return kept + max(target, inverse)

    return ends + block + streams + passes + max(stage(s) for s in shape.stages)


def work_folder(shape: Shape, text: Text, dtype: str, streams: int = 2) -> float:
    """Bytes: finished blocks, and the hidden states, of which new ones are written before the last ones go."""
    of_streams = 2 * text.tokens * shape.hidden * BYTES[dtype]
    return shape.blocks * shape.weights * (1 + 2 * 4 / GROUP) + streams * of_streams


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
    parser.add_argument(
        "--quick", action="store_true", help="small models, to see that it runs; its figures say nothing"
    )
    parser.add_argument("--smollm2-seconds", type=float, help="that the command took for SmolLM2-135M on one core")
    parser.add_argument("--rows", type=Path, default=Path("large_models.jsonl"), help="where to write the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    here = machine()
    print(f"{here['processor']}, {here['threads']} threads, kernels {here['kernels']}, {here['versions']}", flush=True)
    measured, checked = (QUICK_MEASURED, QUICK_CHECKED) if options.quick else (MEASURED, CHECKED)
    costs = Costs([measure(*each) for each in measured])
    print_constants(costs)
    rows = [{"question": "run", **about(*run[:3]), "seconds": run.seconds} for run in costs.runs]
    rows += [check(*each, costs) for each in checked]
    rows.append(whole_command(options.smollm2_seconds, costs))
    print(f"\n{'':<13}{'weights':>10}{'bfloat16':>11}{'float16':>11}{'memory':>11}{'work folder':>13}   most time")
    rows += [predict(shape, COMMAND, costs) for shape in LARGE]
    with options.rows.open("w") as file:
        for row in rows:
            file.write(json.dumps({**row, **here}) + "\n")
    print(f"\nRows: {options.rows}")


if __name__ == "__main__":
    main()
