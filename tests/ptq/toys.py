"""Small random language models, one of each type, by name."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opt8bit.quant.weight import QuantizedWeight

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
GATED = {
    **SIZES,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _make(architecture: str, **config: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers' own, on import
            import transformers

            transformers.logging.set_verbosity_error()
            name = f"{architecture}Config"
            model_class = architecture + ("LMHeadModel" if architecture == "GPT2" else "ForCausalLM")
            torch.manual_seed(0)
            model = getattr(transformers, model_class)(getattr(transformers, name)(**config)).eval()
        for param in model.parameters():  # biases and norms as a trained model has them
            if param.dim() == 1:
                param.data += 0.1 * torch.randn_like(param)
        return model

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "opt": _make("OPT", **SIZES, ffn_dim=64, num_hidden_layers=2, max_position_embeddings=64, word_embed_proj_dim=32),
    "bloom": _make("Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "llama": _make("Llama", **GATED),
    "mistral": _make("Mistral", **GATED, sliding_window=8),
    "mistral-full": _make("Mistral", **GATED, sliding_window=None),
    "qwen2": _make("Qwen2", **GATED),
    "qwen3": _make("Qwen3", **GATED, head_dim=8),
    "falcon": _make("Falcon", **SIZES, num_hidden_layers=2),
    "falcon-grouped": _make("Falcon", **SIZES, num_hidden_layers=2, new_decoder_architecture=True, num_kv_heads=2),
    "gpt2": _make("GPT2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neo": _make(
        "GPTNeo",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        window_size=8,
    ),
    "gemma2": _make("Gemma2", **GATED, head_dim=8, sliding_window=8),
}
# What holds a bias, by the last part of a layer's name; "own" where it is not named.
PLACES: dict[str, dict[str, str | None]] = {
    "opt": {},
    "bloom": {},
    "llama": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias"),
    },
    "mistral": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "mistral-full": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias of LlamaForCausalLM"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias of LlamaForCausalLM"),
    },
    "qwen2": {
        "o_proj": "attention_bias of LlamaForCausalLM",
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias of LlamaForCausalLM"),
    },
    "qwen3": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj")),
    },
    "falcon": dict.fromkeys(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "bias"),
    "falcon-grouped": dict.fromkeys(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "bias"),
    "gpt2": {},
    "gpt_neo": {"q_proj": None, "k_proj": None, "v_proj": "through out_proj"},
    "gemma2": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj")),
    },
}
# The layers that add to the hidden states, by the last part of their names. Gemma 2 has a norm behind them.
WRITERS: dict[str, set[str]] = {
    **{name: {"o_proj", "down_proj"} for name in ("llama", "mistral", "mistral-full", "qwen2", "qwen3")},
    **{name: {"dense", "dense_4h_to_h"} for name in ("bloom", "falcon", "falcon-grouped")},
    "opt": {"out_proj", "fc2"},
    "gpt2": {"c_proj"},
    "gpt_neo": {"out_proj", "c_proj"},
    "gemma2": set(),
}


def token_ids(samples: int = 10, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def quantized(result: Any, layer: str) -> QuantizedWeight:
    """The weight of a compressed layer."""
    change = result.changes[f"{layer}.weight"]
    assert isinstance(change, QuantizedWeight)
    return change


def assert_same_changes(found: Any, expected: Any) -> None:
    """Two results changed the same parameters, to the same bits."""
    assert list(found.changes) == list(expected.changes) and found.changes
    for name, change in expected.changes.items():
        other = found.changes[name]
        if isinstance(change, torch.Tensor):
            assert torch.equal(other, change), name
            continue
        ours, theirs = other.tensors(), change.tensors()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], part) for key, part in theirs.items()), name
        assert other.stored_bits == change.stored_bits


def shaken(model: Any) -> Any:
    """A model whose norms and biases are not all alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param += 0.1 * torch.randn(param.shape, generator=generator)
            else:
                param.copy_(torch.randn(param.shape, generator=generator) * param.shape[-1] ** -0.5)
    return model.eval()


class Mlp(nn.Module):
    """Two linear layers, of so many features."""

    def __init__(self, bias: bool = True, features: tuple[int, int, int] = (6, 12, 4)) -> None:
        super().__init__()
        torch.manual_seed(0)
        inputs, hidden, outputs = features
        self.first, self.second = nn.Linear(inputs, hidden, bias=bias), nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())
