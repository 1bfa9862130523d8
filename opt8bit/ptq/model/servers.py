"""What servers do with packed checkpoints, as tables, and the warnings that follow from them.

The rules were read in the source code of the versions named here. A later version may run more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from opt8bit.backends import first_of
from opt8bit.ptq.model.blocks import by_pattern

VLLM, SGLANG = "vLLM 0.33.0", "SGLang 0.5.23"
NAMED = 4  # patterns of layers in one warning
SKIP = 'an override in a recipe with "skip": true'


class Runs(NamedTuple):
    """What a server runs of a format.

    Attributes:
        server: its name and version.
        format: of checkpoints.
        symmetric: widths in bits of symmetric grids.
        asymmetric: widths in bits of the others.
        group_sizes: None stands for whole rows.
        multiple: that a weight's inputs and outputs have to be of.
        otherwise: what it does with everything else.
    """

    server: str
    format: str
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    group_sizes: tuple[int | None, ...]
    multiple: int
    otherwise: str


MARLIN = (32, 64, 128, None)  # the group sizes of the kernels that both servers have
RUNS = (
    Runs(VLLM, "compressed-tensors", (4, 8), (4,), MARLIN, 1, "runs on NVIDIA GPUs only, if at all (Humming kernels):"),
    Runs(SGLANG, "compressed-tensors", (4, 8), (4,), MARLIN, 64, "does not run"),
    Runs(VLLM, "gptq", (4, 8), (), MARLIN, 1, "refuses"),
)
# Layers that servers put into one matrix, which has one scheme.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\..+")  # a layer of one expert; all experts have one scheme
ROUTER = re.compile(r".*\.(gate|router|shared_expert_gate)(\.(layer|proj|classifier))?")  # held unpacked beside experts
# Biases that a server loads without a word and does not use: server, type of model, own names of layers.
SKIPPED_BIASES = (
    (VLLM, "gemma", r".*"),
    (VLLM, "cohere", r".*"),
    (VLLM, "qwen3", r"o_proj"),
    (SGLANG, "gemma", r".*"),
    (SGLANG, "cohere", r".*"),
    (SGLANG, "granite", r".*"),
    (SGLANG, "llama", r"gate_proj|up_proj|down_proj"),
)


class Packing(NamedTuple):
    """How a weight is packed, as far as servers tell weights apart."""

    bits: int
    symmetric: bool
    group_size: int | None

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, {kind}, {f'groups of {self.group_size}' if self.group_size else 'whole rows'}"


class Layer(NamedTuple):
    """A linear layer of a checkpoint that is to be written: its weight's shape (out, in), and its packing, if any."""

    shape: tuple[int, int]
    packing: Packing | None


def warnings_of(format: str, layers: Mapping[str, Layer], prefix: str, blocks: int, *, has_experts: bool) -> list[str]:
    """Returns what servers refuse, or get wrong, of a checkpoint that is to be written, and what to do about it.

    Args:
        format: of the checkpoint.
        layers: the linear layers of the blocks, by name.
        prefix: the name of the list of blocks.
        blocks: how many there are.
        has_experts: whether blocks have experts, as linear layers or as one tensor.
    """
    if format not in {runs.format for runs in RUNS}:
        return []

    def named(names: Iterable[str]) -> str:
        found = [
            f"{pattern} {shape}" for pattern, shape in by_pattern({n: _shape(layers[n]) for n in names}, prefix, blocks)
        ]
        return first_of(found, NAMED)

    packed = {name: layer for name, layer in layers.items() if layer.packing is not None}
    found = [line for runs in RUNS if runs.format == format for line in _not_run(runs, packed, named)]
    unlike = _unlike(layers)
    if unlike:
        found.append(
            f"{VLLM} and {SGLANG} put these into one matrix, and refuse them, or get them wrong, where they are not "
            f"packed alike: {named(unlike)}: give them the same bits, grids and group size, or leave all of them as "
            "they are, or use format 'dense'"
        )
    routers = [name for name in packed if has_experts and ROUTER.fullmatch(name)]
    if routers:
        found.append(f"{VLLM} and {SGLANG} look for unpacked routers: leave {named(routers)} as they are, by {SKIP}")
    return found


def who_skips(model_type: str | None, layer: str) -> str | None:
    """Returns a sentence on the servers that do not use a layer's bias; None if all that are known do.

    Args:
        model_type: as the written configuration has it.
        layer: its own name, the last part of the whole.
    """
    servers = [server for server, kind, own in SKIPPED_BIASES if kind == model_type and re.fullmatch(own, layer)]
    return f"{' and '.join(servers)} loads this bias and does not use it" if servers else None


def _shape(layer: Layer) -> str:
    return "({} × {})".format(*layer.shape)


def _not_run(runs: Runs, layers: Mapping[str, Layer], named: Callable[[Iterable[str]], str]) -> Iterator[str]:
    by_packing: dict[Packing, list[str]] = {}
    for name, layer in layers.items():
        if layer.packing is not None and _remedies(runs, layer.packing):
            by_packing.setdefault(layer.packing, []).append(name)
    for packing, names in by_packing.items():
        where = "" if len(names) == len(layers) else f" ({named(names)})"
        todo = " and ".join(_remedies(runs, packing))
        yield f"{runs.server} {runs.otherwise} {packing}{where}: use {todo}, or format 'dense'"
    odd = _odd_shapes(layers, runs.multiple)
    if odd:
        yield (
            f"{runs.server} {runs.otherwise} weights whose inputs or outputs are no multiple of {runs.multiple}: "
            f"{named(odd)}: leave them as they are, by {SKIP}, or use format 'dense'"
        )


def _remedies(runs: Runs, packing: Packing) -> list[str]:
    """What to ask for so that a server runs a packing; nothing where it does."""
    found = []
    if packing.bits not in (runs.symmetric if packing.symmetric else runs.asymmetric):
        has_width = packing.bits in runs.symmetric
        found.append("symmetric grids" if has_width else f"{_or(runs.symmetric)} bits, symmetric")
    if packing.group_size not in runs.group_sizes:
        found.append(f"groups of {_or(size for size in runs.group_sizes if size)} or whole rows")
    return found


def _or(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _odd_shapes(layers: Mapping[str, Layer], multiple: int) -> list[str]:
    """The layers whose inputs, or whose outputs together with those of fused ones, are no multiple."""
    outputs = {name: sum(layers[each].shape[0] for each in _fused(name) if each in layers) for name in layers}
    return [name for name, layer in layers.items() if layer.shape[1] % multiple or outputs[name] % multiple]


def _fused(name: str) -> list[str]:
    """The names of the layers that share one matrix in a server, this one among them."""
    parent, _, own = name.rpartition(".")
    return [f"{parent}.{each}" for each in next((names for names in FUSED if own in names), (own,))]


def _unlike(layers: Mapping[str, Layer]) -> list[str]:
    """The layers that a server puts together, though they are not packed alike."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(_fused(name)[0], []).append(name)
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            groups.setdefault(expert["experts"], []).append(name)
    unlike = [names for names in groups.values() if len({layers[name].packing for name in names}) > 1]
    return list(dict.fromkeys(name for names in unlike for name in names))
