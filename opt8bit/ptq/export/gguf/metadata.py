"""Adds what a GGUF file says of a model besides its tensors: sizes, rotary embedding, attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.ptq.model.gguf.architectures import Architecture


class Rope(NamedTuple):
    """A rotary embedding: its base, its ``rope_type`` in transformers, and what else transformers keeps of it."""

    theta: float
    kind: str
    options: dict[str, Any]


def check_metadata(architecture: Architecture, config: Any) -> None:
    """Checks that llama.cpp computes what a configuration says.

    Raises:
        ValueError: it does not; the message names the option.
    """
    if architecture.name == "gemma3":
        _check_gemma3(config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        wanted = architecture.activation
        raise ValueError(f"llama.cpp's {architecture.name} has the activation {wanted!r}, got {activation!r}")
    rope = rope_of(config)
    part = rope.options.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    if part not in (None, 1):
        raise ValueError(f"llama.cpp's {architecture.name} turns all channels of a head, got {part!r} of them")
    if rope.kind not in architecture.rope_types:
        allowed = ", ".join(architecture.rope_types)
        raise ValueError(f"llama.cpp's {architecture.name} has the rope_type {allowed}, got {rope.kind!r}")


def _check_gemma3(config: Any) -> None:
    """
    Raises:
        ValueError: it is a variant that llama.cpp has not.
    """
    wanted = {
        "query_pre_attn_scalar": (config.head_dim,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False),
    }
    for name, values in wanted.items():
        found = getattr(config, name, None)
        if found not in values:
            raise ValueError(f"llama.cpp's gemma3 has {name}={values[0]!r}, got {found!r}")
    if rope_of(config, "sliding_attention").kind != "default":
        raise ValueError("llama.cpp's gemma3 does not scale the rotary embedding of layers that see a window")


def rope_of(config: Any, kind: str = "full_attention") -> Rope:
    """Returns the rotary embedding of the layers of a kind, from the words of transformers 5 or of those before it."""
    options = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    options = dict(options.get(kind) or options)
    theta = options.pop("rope_theta", None) or config.rope_theta
    if kind == "sliding_attention" and hasattr(config, "rope_local_base_freq"):
        theta, options = config.rope_local_base_freq, {}
    found = options.pop("rope_type", None) or options.pop("type", None) or "default"
    return Rope(float(theta), found, options)


def head_dim(config: Any) -> int:
    """Returns the channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int:
    """Returns how long a text may be: no longer than a window that all layers see, which llama.cpp does not know."""
    window = getattr(config, "sliding_window", None)
    sees_a_window = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    length = int(config.max_position_embeddings)
    return min(length, int(window)) if window and sees_a_window else length


def add_metadata(writer: Any, architecture: Architecture, config: Any) -> None:
    """Adds what a model's configuration says to a GGUF file.

    Args:
        writer: of the file, gguf's ``GGUFWriter``.
        architecture: of the model.
        config: that :func:`check_metadata` has let through.
    """
    size, rope = head_dim(config), rope_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_string(f"{architecture.name}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope.options["factor"]))
    if architecture.name == "gemma3":
        _add_gemma3(writer, config)


def _add_gemma3(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    writer.add_float32("gemma3.rope.freq_base_swa", rope_of(config, "sliding_attention").theta)


def frequency_divisors(config: Any) -> Tensor | None:
    """Returns what LLaMA 3 divides the frequencies of the rotary embedding by, float32 (head_dim / 2,), or None.

    Source: transformers, ``_compute_llama3_parameters``.
    """
    rope = rope_of(config)
    if rope.kind != "llama3":
        return None
    factor, low, high, length = (
        float(rope.options[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    size = head_dim(config)
    frequency = rope.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = length * frequency / (2 * math.pi)  # in the length that the model was trained on
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for those that stay as they are
    return (1 / ((1 - smooth) / factor + smooth)).float()
