"""What time and memory does ``opt8bit compress`` take for models of 7, 70 and 180 billion parameters?

    pip install ".[compress]"
    OMP_NUM_THREADS=1 python benchmarks/large_models.py [--smollm2-seconds SECONDS]

Models of one block, of several widths and with random weights, are compressed on one core by the default recipe, and
the seconds of every part of it, such as the sums over tokens, divided by how often that part does its least operation.
That number should not depend on the width: the first table has it for every run. What is then told of large models is
the sum over all parts, with the one constant that all runs together have. Two shapes that have no share in the
constants are compressed, too, from a checkpoint's files and in a process of their own: time, memory and work folder are
printed beside what is told of them. Reading the model, and logits at its end, are not counted. Every run, check and
prediction is one line of the rows' file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
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

GROUP, BATCH, HEAD = 64, 8, 64  # weights of a scale, sequences of a batch, features of a head of the models measured
SWEEPS = DEFAULT_METHOD.sweeps * (1 + DEFAULT_METHOD.refits)
BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}


class Stage(NamedTuple):
    """Layers of a block that read the same tensor."""

    out: int  # of all of them
    inputs: int
    writes: bool = False  # to the hidden states: the sums have their drift, too

    @property
    def weights(self) -> int:
        return self.out * self.inputs


class Shape(NamedTuple):
    """What a model's costs depend on."""

    name: str
    hidden: int
    queries: int  # features of all heads
    stages: list[Stage]
    held: int  # features of a token that a pass has at hand where it halts with most
    blocks: int = 1
    vocabulary: int = 512
    ends: int = 2  # embedding and output head; 1 where they are one

    @property
    def weights(self) -> int:
        """Of one block."""
        return sum(stage.weights for stage in self.stages)


class Text(NamedTuple):
    samples: int
    length: int = 512
    held_out: int = 0

    @property
    def learned(self) -> int:
        return self.samples * self.length

    @property
    def tokens(self) -> int:
        return self.learned + self.held_out * self.length


def llama(name: str, hidden: int, intermediate: int, heads: int, kv_heads: int, head: int, **ends: int) -> Shape:
    queries, keys = heads * head, kv_heads * head
    stages = [
        Stage(queries + 2 * keys, hidden),
        Stage(hidden, queries, True),
        Stage(2 * intermediate, hidden),
        Stage(hidden, intermediate, True),
    ]
    # Before down_proj: the block's input, the residual, its norm, and the input of down_proj. Before o_proj: the
    # block's input, its norm, queries, keys, values, and the output of attention.
    held = max(3 * hidden + intermediate, 2 * hidden + 2 * queries + 2 * keys)
    return Shape(name, hidden, queries, stages, held, **ends)


def falcon(name: str, hidden: int, fused: int, **ends: int) -> Shape:
    """Attention and MLP side by side, each with a norm of its own."""
    stages = [
        Stage(fused, hidden),
        Stage(hidden, hidden, True),
        Stage(4 * hidden, hidden),
        Stage(hidden, 4 * hidden, True),
    ]
    return Shape(name, hidden, hidden, stages, held=8 * hidden, **ends)


SMOLLM2 = llama("SmolLM2-135M", 576, 1536, 9, 3, 64, blocks=30, vocabulary=49152, ends=1)
LARGE = [
    llama("LLaMA-2-7B", 4096, 11008, 32, 32, 128, blocks=32, vocabulary=32000),
    llama("LLaMA-2-70B", 8192, 28672, 64, 8, 128, blocks=80, vocabulary=32000),
    falcon("Falcon-180B", 14848, 14848 + 2 * 8 * 64, blocks=80, vocabulary=65024, ends=1),
]


class Part(NamedTuple):
    """One part of the work.

    Attributes:
        unit: what is counted.
        count: in one block.
        sites: the functions that do it; what others do inside them is theirs.
        in_dtype: whether it is done in the model's dtype, whatever that is, rather than always in the same one.
    """

    unit: str
    count: Callable[[Shape, Text], float]
    sites: list[tuple[Any, str]]
    in_dtype: bool = False


def over_stages(count: Callable[[Stage], float]) -> Callable[[Shape, Text], float]:
    return lambda shape, text: sum(count(stage) for stage in shape.stages)


def sums(shape: Shape, text: Text) -> float:
    """Of Σ x̂ x̂ᵀ one half, Σ x x̂ᵀ, and where there is a drift Σ δ x̂ᵀ."""
    return text.learned * sum(s.inputs * (1.5 * s.inputs + shape.hidden * s.writes) for s in shape.stages)


# MAC: a multiplication and addition. Passes and errors are of the float model and of the compressed one.
PARTS = {
    "linear layers": Part("MAC", lambda s, t: 2 * t.tokens * s.weights, [(nn.Linear, "forward")], True),
    "attention": Part(
        "MAC",
        lambda s, t: 2 * t.tokens * 2 * t.length * s.queries,
        [(functional, "scaled_dot_product_attention")],
        True,
    ),
    "rest of the passes": Part(
        "output",
        lambda s, t: 2 * t.tokens * sum(stage.out for stage in s.stages),
        [(Walk, "advance"), (Walk, "finish")],
        True,
    ),
    "errors of outputs": Part(
        "output", lambda s, t: t.learned * sum(stage.out for stage in s.stages), [(OutputErrors, "compare")], True
    ),
    "sums over tokens": Part("MAC", sums, [(Statistics, "update")]),
    # A Cholesky factor, a product and a solution; the other product is compress_stage's own.
    "targets, float64": Part(
        "MAC",
        over_stages(lambda s: s.inputs**3 / 6 + 3 * s.weights * s.inputs),
        [(layer, "asymmetric_target"), (pipeline, "compress_stage")],
    ),
    "inverses, float64": Part("MAC", over_stages(lambda s: s.inputs**3 * 2 / 3), [(gptq, "inverse_factor")]),
    "grids": Part("weight", over_stages(lambda s: s.weights), [(LayerKernels, "fit")]),
    "GPTQ and descent": Part(
        "MAC",
        over_stages(lambda s: (0.5 + SWEEPS) * s.weights * s.inputs),
        [(LayerKernels, "gptq"), (LayerKernels, "coordinate_descent")],
    ),
    # Two products, and a system of as many equations as a row has groups.
    "refits of scales": Part(
        "MAC",
        over_stages(lambda s: DEFAULT_METHOD.refits * s.weights * s.inputs * (2 + s.inputs / (3 * GROUP**3))),
        [(quantease, "refit_scales")],
    ),
    "all else": Part("weight", lambda s, t: s.weights, [(ptq, "compress")]),
}


class Stopwatch:
    """Seconds by name; those of what is inside something else are not that one's."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._inside.append(0.0)
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
                    replacement = self.timed(name, getattr(owner, attribute))
                    stack.enter_context(mock.patch.object(owner, attribute, replacement))
            yield


class Run(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    text: Text
    seconds: dict[str, float]  # by part


def random_model(shape: Shape, dtype: torch.dtype) -> Any:
    """Of LLaMA's type."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.stages[-1].inputs,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.queries // HEAD,
        num_key_value_heads=(shape.stages[0].out - shape.queries) // 2 // HEAD,
        head_dim=HEAD,
        vocab_size=shape.vocabulary,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def token_ids(shape: Shape, text: Text) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (text.samples, text.length), generator=generator)


def measure(shape: Shape, dtype: torch.dtype, text: Text) -> Run:
    model, watch = random_model(shape, dtype), Stopwatch()
    with watch.on_parts():
        ptq.compress(model, token_ids(shape, text), group_size=GROUP, batch_size=BATCH)
    return Run(shape, dtype, text, dict(watch.seconds))


def constant(name: str, dtype: torch.dtype, runs: list[Run]) -> float:
    """Seconds of a unit, of all runs together: the larger a run, the more it says."""
    part = PARTS[name]
    used = [run for run in runs if run.dtype == dtype or not part.in_dtype]
    return sum(run.seconds[name] for run in used) / sum(part.count(run.shape, run.text) for run in used)


def seconds(shape: Shape, text: Text, constants: dict[str, float]) -> float:
    return shape.blocks * sum(constants[name] * part.count(shape, text) for name, part in PARTS.items())


def memory(shape: Shape, text: Text, dtype: torch.dtype) -> float:
    """Bytes at the worst moment: a block's widest stage has its sums, and GPTQ is after its inverse factor."""
    each, double = BYTES[dtype], 8
    ends = shape.ends * shape.vocabulary * shape.hidden * each
    block = shape.weights * (2 * each + 1 + 2 * 4 / GROUP)  # twice as it is, and codes with scales and zero points
    streams = 2 * text.tokens * shape.hidden * each
    passes = text.learned * (2 * shape.held * each + 4 * shape.hidden)  # of both models, and the drift

    def stage(s: Stage) -> float:
        kept = 2 * double * (2 * s.inputs**2 + shape.hidden * s.inputs * s.writes)  # sums, and moments from them
        target = double * 2 * s.inputs**2 + 40 * s.weights  # two matrices; five of the weight's shape in float64
        inverse = double * 7 * s.inputs**2 + 24 * s.weights  # ordered, reversed, damped, two factors, identity, inverse
        return kept + max(target, inverse)

    return ends + block + streams + passes + max(stage(s) for s in shape.stages)


def work_folder(shape: Shape, text: Text, dtype: torch.dtype, sets: int = 2) -> float:
    """Bytes: finished blocks, and hidden states; those of the next block stand beside the last one's for a moment."""
    streams = 2 * text.tokens * shape.hidden * BYTES[dtype]
    return shape.blocks * shape.weights * (1 + 2 * 4 / GROUP) + sets * streams


def status(key: str) -> int:
    """Bytes that the system has for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def real_run(folder: Path, ids: torch.Tensor) -> tuple[float, float, float]:
    """Seconds, bytes of memory beyond what the imports take, and bytes of the work folder."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    before, started = status("VmRSS"), time.perf_counter()
    ptq.compress(ptq.Checkpoint(folder), ids, group_size=GROUP, batch_size=BATCH, work=folder / "work")
    elapsed = time.perf_counter() - started
    return elapsed, status("VmHWM") - before, sum(file.stat().st_size for file in (folder / "work").iterdir())


def check(shape: Shape, dtype: torch.dtype, text: Text, runs: list[Run]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        random_model(shape, dtype).save_pretrained(folder)
        # A process of its own: the peak of memory is since its start.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(real_run, Path(folder), token_ids(shape, text)).result()
    constants = {name: constant(name, dtype, runs) for name in PARTS}
    told = (seconds(shape, text, constants), memory(shape, text, dtype), work_folder(shape, text, dtype, sets=1))
    print(f"{shape.name}, {shape.blocks} blocks, {dtype}, {text.samples} samples")
    for name, unit, size, told_it, was in zip(
        ("time", "memory", "work folder"), ("s", "MB", "MB"), (1, 1e6, 1e6), told, measured, strict=True
    ):
        print(f"  {name:<12} told {told_it / size:8,.1f} {unit:<2}  measured {was / size:8,.1f}  {told_it / was - 1:+.0%}")
    names = ("seconds", "memory_bytes", "work_bytes")
    return {"told": dict(zip(names, told, strict=True)), "measured": dict(zip(names, measured, strict=True))}
