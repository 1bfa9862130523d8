"""Maps models of transformers to llama.cpp's architectures: names of tensors, orders of rows, biases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

WEIGHT, BIAS = "weight", "bias"
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PREFIX = "model.layers"
_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_PRE_NORM = {**_LAYERS, "post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SANDWICHED = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OF_INPUTS = frozenset({"attn_q", "attn_k", "attn_v"})  # projections that every architecture may have biases for


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: in ``general.architecture``.
        layers: llama.cpp's names of the modules of a block, by those in transformers.
        biases: llama.cpp's names of the layers that it adds a bias to. It refuses files with others.
        turns_neighbours: whether its rotary embedding turns neighbouring channels of a head, where transformers turns
            channels of its two halves: the rows of queries and keys stand in another order then.
        norm_offset: what it has added to the scales of norms.
        activation: of the MLP, as ``hidden_act`` of transformers has it.
        rope_types: of its rotary embedding, as transformers has them.
    """

    name: str
    layers: Mapping[str, str]
    biases: frozenset[str]
    turns_neighbours: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    rope_types: tuple[str, ...] = ("default", "linear")

    def stored_name(self, name: str) -> str | None:
        """Returns llama.cpp's name of a tensor of the model, or None where it has none."""
        owner, _, kind = name.rpartition(".")
        block = re.fullmatch(rf"{re.escape(PREFIX)}\.(\d+)\.(.+)", owner)
        own = OUTSIDE.get(owner) if block is None else self.layers.get(block[2])
        if own is None or (kind == BIAS and own not in self.biases):
            return None
        return f"{own}.{kind}" if block is None else f"blk.{block[1]}.{own}.{kind}"

    def model_name(self, stored: str) -> str | None:
        """Returns the model's name of a tensor, or None where the model has no such tensor."""
        owner, _, kind = stored.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", owner)
        names = OUTSIDE if block is None else self.layers
        found = next((name for name, own in names.items() if own == (owner if block is None else block[2])), None)
        if found is None:
            return None
        return f"{found}.{kind}" if block is None else f"{PREFIX}.{block[1]}.{found}.{kind}"

    def heads(self, stored: str, heads: int, key_heads: int) -> int | None:
        """Returns the number of heads whose rows stand in another order in a tensor; None where they do not."""
        own = stored.rpartition(".")[0].rpartition(".")[2]
        return {"attn_q": heads, "attn_k": key_heads}.get(own) if self.turns_neighbours else None

    def offset(self, stored: str) -> float:
        """Returns what is added to a tensor where it is stored."""
        return self.norm_offset if stored.removesuffix(f".{WEIGHT}").endswith("norm") else 0.0


def as_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Returns the rows of each head with those of its two halves in turn."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def as_halves(tensor: Tensor, heads: int) -> Tensor:
    """Undoes :func:`as_neighbours`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


_LLAMA = Architecture(
    "llama",
    _PRE_NORM,
    frozenset(_LAYERS.values()) - {"attn_norm"},
    turns_neighbours=True,
    rope_types=("default", "linear", "llama3"),
)
_GEMMA3 = Architecture(
    "gemma3",
    {**_LAYERS, **_HEAD_NORMS, **_SANDWICHED},
    _OF_INPUTS,
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
)
ARCHITECTURES: Mapping[str, Architecture] = {  # by transformers' model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _PRE_NORM, _OF_INPUTS),
    "qwen3": Architecture("qwen3", {**_PRE_NORM, **_HEAD_NORMS}, _OF_INPUTS),
    "gemma3_text": _GEMMA3,
}


def architecture_of(config: Any) -> Architecture:
    """Returns the architecture of a model's configuration.

    Raises:
        ValueError: it is not known here.
    """
    kind = getattr(config, "model_type", None)
    found = ARCHITECTURES.get(f"{kind}")
    if found is None:
        raise ValueError(f"gguf holds models of the types {', '.join(ARCHITECTURES)}, got {kind!r}")
    return found


def named(name: str) -> Architecture:
    """Returns an architecture by llama.cpp's name.

    Raises:
        ValueError: it is not known here.
    """
    found = {each.name: each for each in ARCHITECTURES.values()}
    if name not in found:
        raise ValueError(f"general.architecture must be one of {', '.join(found)}, got {name!r}")
    return found[name]
