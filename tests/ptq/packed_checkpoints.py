"""Checkpoints with packed weights as other tools write them, packed here by code of the tests' own."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Rounded(NamedTuple):
    """A weight on a grid of its own."""

    codes: Tensor  # (out, in)
    zero_point: Tensor  # (out, groups)
    scale: Tensor  # (out, groups)
    group: Tensor  # (in,)

    @property
    def values(self) -> Tensor:
        return (self.codes - self.zero_point[:, self.group]).float() * self.scale.float()[:, self.group]


def rounded(weight: Tensor, bits: int = 4, *, symmetric: bool = False, levels: int = 4, order: bool = False) -> Rounded:
    """Rounds to few levels, of a grid that may have more: so that there is an error to correct.

    Args:
        weight: (out, in).
        bits: of a code.
        symmetric: whether all zero points are in the middle.
        levels: of the grid that are used.
        order: whether inputs are in groups in another order than their own.
    """
    inputs = weight.shape[1]
    group = torch.arange(inputs) // GROUP
    if order:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
    groups = int(group.max()) + 1
    low = torch.stack([weight[:, group == i].amin(1) for i in range(groups)], 1).clamp(max=0)
    high = torch.stack([weight[:, group == i].amax(1) for i in range(groups)], 1).clamp(min=0)
    middle = 2 ** (bits - 1)
    if symmetric:
        scale = torch.maximum(-low, high) / (levels / 2)
        zero_point = torch.full(scale.shape, middle)
    else:
        scale = (high - low) / (levels - 1)
        zero_point = (-low / scale).round().long() + 1  # 0 is what version 1 of GPTQ's cannot hold
    scale = scale.to(torch.float16).float()
    codes = (weight / scale[:, group]).round().long() + zero_point[:, group]
    return Rounded(codes.clamp(0, 2**bits - 1), zero_point, scale, group)


def in_words(codes: Tensor, bits: int, each: int | None = None) -> Tensor:
    """Rows of codes as words of 32 bits, bit to bit, or ``each`` to a word."""
    rows = []
    for row in codes.tolist():
        runs = [row] if each is None else [row[i : i + each] for i in range(0, len(row), each)]
        words = []
        for run in runs:
            stream = sum(code << (bits * i) for i, code in enumerate(run))
            count = -(-len(run) * bits // 32)
            words += [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def compressed_tensors(
    weight: Rounded, bits: int, *, each: int | None = None, loose: bool = False
) -> dict[str, Tensor]:
    """As llm-compressor writes it; ``each`` codes to a word before version 0.18, and zero points as int8 if loose."""
    middle = 2 ** (bits - 1)
    parts = {
        "weight_packed": in_words(weight.codes, bits, each),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if loose:
        parts["weight_zero_point"] = (weight.zero_point - middle).to(torch.int8)
    elif not bool((weight.zero_point == middle).all()):
        parts["weight_zero_point"] = in_words(weight.zero_point.T, bits, each).T.contiguous()
    if not bool((weight.group.diff() >= 0).all()):
        parts["weight_g_idx"] = weight.group.int()
    return parts


def gptq(weight: Rounded, bits: int, *, shift: int = 1, g_idx: bool = True) -> dict[str, Tensor]:
    """As AutoGPTQ (shift 1) or version 2 of GPTQModel's (shift 0) write it."""
    parts = {
        "qweight": in_words(weight.codes, bits).T.contiguous(),
        "qzeros": in_words(weight.zero_point.T - shift, bits),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
    }
    return {**parts, "g_idx": weight.group.int()} if g_idx else parts


def awq(weight: Rounded) -> dict[str, Tensor]:
    """As AutoAWQ writes it."""

    def packed(codes: Tensor) -> Tensor:
        return in_words(codes.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4)

    return {
        "qweight": packed(weight.codes.T),
        "qzeros": packed(weight.zero_point.T),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
    }


def group_header(bits: int, symmetric: bool, targets: list[str] | None = None) -> dict[str, Any]:
    """A group of weights in the header of compressed-tensors."""
    weights = {
        **{"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP},
        **{"dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax"},
    }
    return {"targets": targets or ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}


def ct_header(*groups: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
        **{"config_groups": {f"group_{i}": group for i, group in enumerate(groups)}, "ignore": ["lm_head"]},
        **{"kv_cache_scheme": None, "version": "0.15.0"},
    }


class Kind(NamedTuple):
    """How a tool writes checkpoints: how weights are rounded, packed, and what its header says."""

    round: Callable[[Tensor], Rounded]
    pack: Callable[[Rounded], dict[str, Tensor]]
    header: dict[str, Any]


KINDS = {
    "compressed-tensors": Kind(
        lambda w: rounded(w, symmetric=True),
        lambda r: compressed_tensors(r, 4),
        ct_header(group_header(4, True)),
    ),
    "gptq": Kind(
        lambda w: rounded(w, bits=2),
        lambda r: gptq(r, 2),
        {"quant_method": "gptq", "bits": 2, "group_size": GROUP, "sym": False, "desc_act": False},
    ),
    "gptq-order": Kind(
        lambda w: rounded(w, order=True),
        lambda r: gptq(r, 4, shift=0),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "awq": Kind(
        rounded,
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    ),
    "auto-round": Kind(
        rounded,
        lambda r: gptq(r, 4, shift=0, g_idx=False),
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round:gptqmodel"},
    ),
}


def write_packed(base: Path, path: Path, kind: Kind, shards: int = 1) -> dict[str, Tensor]:
    """Writes a checkpoint with the weights of a model's blocks packed.

    Args:
        base: folder of the model.
        path: to write to.
        kind: of the checkpoint.
        shards: files of tensors.

    Returns:
        The tensors of the float model that it stands for.
    """
    state, stored, values = load_file(base / "model.safetensors"), {}, {}
    for name, tensor in state.items():
        values[name] = tensor
        owner, _, own = name.rpartition(".")
        if ".layers." in name and own == "weight" and tensor.dim() == 2:
            weight = kind.round(tensor.float())
            values[name] = weight.values
            stored |= {f"{owner}.{part}": value for part, value in kind.pack(weight).items()}
        else:
            stored[name] = tensor
    path.mkdir()
    names = sorted(stored)
    files = {
        name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    if shards == 1:
        files = dict.fromkeys(names, "model.safetensors")
    for file in set(files.values()):
        inside = {name: stored[name].contiguous() for name in names if files[name] == file}
        save_file(inside, path / file, metadata={"format": "pt", "made_by": "a test"})
    if shards > 1:
        total = sum(tensor.nbytes for tensor in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((base / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": kind.header}))
    (path / "quantize_config.json").write_text('{"damp": 0.01}')
    (path / "notes").mkdir()
    (path / "notes" / "README.md").write_text("as it was")
    return values


def moved_scales(model: Any, spread: float = 3.0) -> Any:
    """A LLaMA that computes the same with scales elsewhere, as AWQ's: of norms, and of up_proj, in what reads them."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in result.model.layers:
            attention, mlp = block.self_attn, block.mlp
            links = (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
                (mlp.up_proj, (mlp.down_proj,)),
            )
            for producer, readers in links:
                scale = torch.rand(len(producer.weight), generator=generator) * spread + 0.3
                producer.weight /= scale if producer.weight.dim() == 1 else scale[:, None]
                for reader in readers:
                    reader.weight *= scale
    return result
