"""Tiny random models of every causal architecture that transformers has, for ``architectures.py``.

A configuration is shrunk by the names of its entries: what is a width, a number of heads or of experts, or a window is
set to a small value by the first pattern of ``SIZES`` that fits. Layers are chosen so that each kind comes once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, POSITIONS, WINDOW = 128, 128, 16
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD, FIRST_SPECIAL = 3, 96  # tokens from the one to the other stand for words
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, EXPERTS = 64, 128, 4, 16, 4

# The first pattern that fits all of an entry's name gives its value; what has no pattern stays as it is.
SIZES: tuple[tuple[str, int | Callable[[int], int]], ...] = (
    ("type_vocab_size|task_type_vocab_size", 2),
    (r".*vocab_size.*|encoder_hash_byte_group_vocab|codebook_size", VOCABULARY),
    ("pad_token_id", PAD),
    ("bos_token_id|decoder_start_token_id", BOS),
    ("eos_token_id|forced_eos_token_id|sep_token_id", EOS),
    ("(max|n)_position(_embedding)?s|max_(source|target)_positions|n_ctx|max_seq_len|model_max_length", POSITIONS),
    # Of 48 tokens: with fewer, rounding would change which of them are attended to.
    ("index_topk|keep_window_size", 40),
    (r"(attention_)?(sliding_)?window(_size)?|local_attention(_window_len)?|attention_chunk_size", WINDOW),
    ("chunk_size|mamba_chunk_size|l?l?o?c?a?s?h?_attn_chunk_length", WINDOW),
    (
        r".*intermediate_size.*|((en|de)coder_)?ffn_dim|d_ff|.*ffn_hidden_size|feed_forward_size|dff|dim_ff|mlp_dim|d_inner",
        INTERMEDIATE,
    ),
    (
        r"((out|attention|backbone)_)?hidden_size(_global)?|(word_)?embed(ding|_proj)?_(dim|size)|d_model|n_embd|d_embed|emb_dim"
        "|lru_width|adapter_(in|out)_dim",
        HIDDEN,
    ),
    (r"hidden_size_per_layer_input|.*lora_rank|laurel_rank|.*time_step_rank|mamba_dt_rank", HIDDEN // 2),
    (r"(swa_)?num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups", lambda heads: min(heads, HEADS // 2)),
    (r"linear_num_(key_)?heads|index_n_heads", HEADS // 2),
    (r"mamba_n(um)?_heads|.*mamba_heads", 2 * HEADS),
    (r".*num_attention_heads|.*attention_heads|n_heads?|num_heads|linear_num_value_heads", HEADS),
    ("qk_head_dim", 2 * HEAD_DIM),
    (r".*head_?dim|d_kv|kv_channels|d_head|dim_head|mamba_d_head|rotary_dim|attention_head_size", HEAD_DIM),
    (r"(mamba_d_state|state_size|ssm_state_size)", 8),
    (r".*num_(local_)?experts|n_routed_experts|zero_expert_num", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k", lambda experts: min(experts, 2)),
    (r"n_group|num_expert_group|n_groups|mamba_n_?groups", lambda groups: min(groups, 2)),
    ("topk_group", 1),
    ("first_k_dense_replace|num_dense_layers|max_window_layers|num_kv_shared_layers", lambda layers: min(layers, 1)),
    (".*image_size|crop_size", 32),
    ("patch_size", lambda size: min(size, 16)),
)
LAYERS = "num_hidden_layers|n_layers?|num_layers|((en|de)coder|num_(en|de)coder)_layers|depth|num_blocks"
LEAST_LAYERS, MOST_LAYERS = 2, 4
# Entries that are None by default and whose models cannot do without.
UNNAMED = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS // 2}
# Without which a configuration cannot even be made.
NO_INPUTS_BY_LAYER = {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": NO_INPUTS_BY_LAYER,
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
}

BERTS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
IS_5 = int(transformers.__version__.partition(".")[0]) >= 5
LINEAR, FULL = ("linear_attention", "full_attention") if IS_5 else ("mamba", "attention")
SLIDING = ["sliding_attention", "full_attention"]
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2}
ZAMBA = {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM}  # it reads two widths side by side
PAIRS = {"num_hidden_layers": 4, "layers_block_type": [LINEAR, LINEAR, "hybrid", "hybrid"]}  # two share weights
LATENT = {
    **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 32, "kv_lora_rank": 32},
    **{"head_dim": 2 * HEAD_DIM, "qk_nope_head_dim": HEAD_DIM, "v_head_dim": HEAD_DIM},
}
KV_SHARED = {"num_hidden_layers": 4, "layer_types": SLIDING * 2, "num_kv_shared_layers": 2}


def _merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Both, and the others where there are two; so of configurations inside."""
    both = {name: _merged(values[name], other) for name, other in others.items() if isinstance(values.get(name), dict)}
    return {**values, **others, **both}


# By type of model, or of a part of one, what the names do not tell.
OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in BERTS},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {kind: ROPE for kind in SLIDING}, "layer_types": SLIDING},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": SLIDING * 2,
        **{"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    },
    "dots3_note_text": {
        **{"num_hidden_layers": 2, "layer_types": ["indexed_attention", "sliding_attention"], "head_dim": 2 * HEAD_DIM},
        "mlp_layer_types": ["dense", "sparse"],
        **{f"swa_{name}": value for name, value in LATENT.items()},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "conv_output_size": 256},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2, "layer_types": SLIDING},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128},
    "gemma3n_text": KV_SHARED,
    "gemma4_text": KV_SHARED,
    "gemma4_assistant": _merged(NO_INPUTS_BY_LAYER, {"text_config": {"num_kv_shared_layers": 4}}),  # all of its layers
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},  # all of its layers
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA2, "layer_types": [LINEAR, FULL]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {
        "cross_attention_layers": [1],
        **({} if IS_5 else {"rope_scaling": {"rope_type": "default"}}),
    },
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4},
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **{"hash_seed": 0, "is_decoder": True, "num_buckets": 4},
        **{"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    },
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "transfo-xl": {"cutoffs": [32, 64, 96]},
    "xlstm": {  # half of its width is rounded up to a multiple of 64; transformers 4.57 has states of one chunk alone
        **{"hidden_size": 128, "embedding_dim": 128, "chunk_size": 64},
    },
    "zamba": {**ZAMBA, **PAIRS, "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "zamba2": {**ZAMBA, **PAIRS, "hybrid_layer_ids": [2, 3], "mamba_headdim": 16, "n_mamba_heads": 8},
}


def model_types() -> list[str]:
    """Returns the types that ``AutoModelForCausalLM`` knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """Returns the class of that type's models."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def model_class(model_type: str) -> Any:
    return getattr(transformers, class_name(model_type))


def tiny_config(model_type: str) -> Any:
    """Returns a configuration of that type, shrunk."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class(**NEEDED.get(model_type, {})).to_dict(), model_type))


def _shrunk(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """What has to be changed of a configuration's values."""
    layers = _chosen_layers(values)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(value.get("model_type"), str):
            kind = value["model_type"]
            changed[name] = {**({"model_type": kind} if kind else {}), **_shrunk(value, kind)}
            if "text" not in name and "intermediate_size" in changed[name]:  # the language model is to be the largest
                changed[name]["intermediate_size"] = INTERMEDIATE // 4
        elif isinstance(value, list) and value and len(value) == _depth(values):  # an entry for each layer
            changed[name] = [_resized(name, value[i], len(layers)) for i in layers]
        else:
            changed[name] = _resized(name, value, len(layers))
    if values.get("kv_lora_rank"):  # keys and values of latent attention have all heads
        changed["num_key_value_heads"] = HEADS
    changed = {name: value for name, value in changed.items() if value != values[name]}
    return _merged(changed, OVERRIDES.get(model_type, {}))


def _resized(name: str, value: Any, layers: int) -> Any:
    """The value that an entry is to have."""
    if value is None:
        return UNNAMED.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.fullmatch(LAYERS, name):
        return layers
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size(value) if callable(size) else size
    return value


def _depth(values: Mapping[str, Any]) -> int:
    depths = [value for name, value in values.items() if re.fullmatch(LAYERS, name) and isinstance(value, int)]
    return max(depths, default=0)


def _chosen_layers(values: Mapping[str, Any]) -> list[int]:
    """The layers to keep: the first of each kind, as the lists that have an entry for every layer tell them."""
    depth = _depth(values)
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth]
    first: dict[str, int] = {}
    for i in range(depth):
        first.setdefault(str([value[i] for value in lists]), i)
    chosen = sorted(first.values())[:MOST_LAYERS]
    return chosen if len(chosen) >= LEAST_LAYERS else list(range(LEAST_LAYERS))


def tiny_model(model_type: str) -> Any:
    """Returns a model of that type with random weights."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    inner: Any = getattr(config, "text_config", None)
    if type(inner) is model_class(model_type).config_class and inner.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = inner  # the class is of the language model alone
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() >= 2:  # as large as those of trained models: logits are to differ
                param.normal_(std=param.shape[-1] ** -0.5)
            else:  # biases and norms as trained models have them
                param += 0.1 * torch.randn_like(param)
    return model


def tiny_tokenizer() -> Any:
    """Returns a tokenizer with a word for each token."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(FIRST_WORD, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
