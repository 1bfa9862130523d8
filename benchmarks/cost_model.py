"""What compressing a model costs: its parts, how often each does its least operation, and what memory they hold."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from torch import nn
from torch.nn import functional

from opt8bit import ptq
from opt8bit.ptq import block, stage, stage_inputs
from opt8bit.ptq.calibration.outputs import OutputErrors
from opt8bit.ptq.calibration.statistics import Statistics
from opt8bit.ptq.model.walk import Walk
from opt8bit.ptq.plan import polished
from opt8bit.ptq.rounding import gptq, quantease
from opt8bit.ptq.rounding.compiled import CompiledEngine

GROUP, HEAD = 64, 64  # weights that share a scale; features of a head of the models that are measured
POLISH = polished(ptq.GPTQ())
REFITS, SWEEPS = POLISH.refits, POLISH.sweeps * (1 + POLISH.refits)
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Stage:
    """Layers of a block that read one tensor."""

    outputs: int  # of all of them
    inputs: int
    writes: bool = False  # to the hidden states: what it should put out is in the sums then, in place of its inputs

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
    """Half of Σ x̂ x̂ᵀ, and Σ x x̂ᵀ; or for what is added to the hidden states Σ y x̂ᵀ, and y (which float32 has)."""
    return text.learned * shape.each(lambda s: s.inputs * (0.5 * s.inputs + (2 * s.outputs if s.writes else s.inputs)))


def _targets(shape: Shape, text: Text) -> float:
    """A Cholesky factor, a product, a solution by two triangles."""
    return shape.each(lambda s: s.inputs**3 / 6 + 2 * s.weights * s.inputs)


def _refits(shape: Shape, text: Text) -> float:
    """A product, and each time half of another, and for each row a system of as many equations as it has groups."""
    return shape.each(lambda s: s.weights * s.inputs * (1 + REFITS * (0.5 + s.inputs / (3 * GROUP**3))))


def _attention(shape: Shape, text: Text) -> float:
    return 2 * text.tokens * 2 * text.length * shape.queries


ATTENTION = (functional, "scaled_dot_product_attention")
PASSES, STAGES = ((Walk, "step"),), ((stage, "asymmetric_target"), (block, "compress_stage"))
ROUNDING = ((CompiledEngine, "error_feedback"), (CompiledEngine, "coordinate_descent"))
REFITTING = ((quantease, "refit_scales"), (quantease, "linear"))
PARTS = {  # passes go through two models
    "linear layers": Part("MAC", lambda s, t: 2 * t.tokens * s.weights, ((nn.Linear, "forward"),), in_dtype=True),
    "attention": Part("MAC", _attention, (ATTENTION,), in_dtype=True),
    "rest of the passes": Part("output", lambda s, t: 2 * t.tokens * s.outputs, PASSES, in_dtype=True),
    "errors of outputs": Part("output", lambda s, t: t.learned * s.outputs, ((OutputErrors, "compare"),), True),
    "sums over tokens": Part("MAC", _sums, ((Statistics, "update"), (stage_inputs, "linear"))),
    "targets, float64": Part("MAC", _targets, STAGES),
    "inverses, float64": Part("MAC", lambda s, t: s.each(lambda s: s.inputs**3 * 2 / 3), ((gptq, "inverse_factor"),)),
    "grids": Part("weight", lambda s, t: s.weights, ((CompiledEngine, "fit"),)),
    "GPTQ and descent": Part("MAC", lambda s, t: s.each(lambda s: (0.5 + SWEEPS) * s.weights * s.inputs), ROUNDING),
    "refits of scales": Part("MAC", _refits, REFITTING),
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
    # Of two models; before a layer that writes to the hidden states, their drift, its output, and what that should be.
    passes = text.learned * (2 * shape.held * size + (4 + size + 4) * shape.hidden)

    def stage(s: Stage) -> float:
        square = double * s.inputs**2
        kept = 2 * (square + (double * s.weights if s.writes else square))  # sums, and the moments that they give
        target = 2 * square + 32 * s.weights  # damped, factor; the weights four times in float64
        inverse = 7 * square + 24 * s.weights  # ordered, reversed, damped, two factors, identity and inverse
        return kept + max(target, inverse)

    return ends + block + streams + passes + max(stage(s) for s in shape.stages)


def work_folder(shape: Shape, text: Text, dtype: str, streams: int = 2) -> float:
    """Bytes: finished blocks, and the hidden states, of which new ones are written before the last ones go."""
    of_streams = 2 * text.tokens * shape.hidden * BYTES[dtype]
    return shape.blocks * shape.weights * (1 + 2 * 4 / GROUP) + streams * of_streams
