"""Small random models of architectures whose blocks do more than take hidden states and return them, by name."""

import warnings
from typing import Any

import torch

VOCABULARY, WINDOW = 96, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SLIDING = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
SHARED = {
    **SIZES,
    **SLIDING,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
# The model's class, its configuration's, and what that is made of.
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, **SLIDING}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**SIZES, **SLIDING},
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **SHARED,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "altup_num_inputs": 2,
            "laurel_rank": 4,
        },
    ),
    "gemma4_text": ("Gemma4ForCausalLM", "Gemma4TextConfig", {**SHARED, "global_head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, **EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**SIZES, **EXPERTS}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**SIZES, **EXPERTS, **SLIDING}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**SIZES, **EXPERTS}),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {**SIZES, **EXPERTS, "kv_channels": 8, "num_key_value_heads": 2}),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**SIZES, **EXPERTS, "intermediate_size_mlp": 48, "head_dim": 8, "attention_chunk_size": WINDOW},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **SIZES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        {
            **SIZES,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", MAMBA),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    ),
    "cpmant": (
        "CpmAntForCausalLM",
        "CpmAntConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "dim_head": 8,
            "dim_ff": 48,
            "num_hidden_layers": 2,
        },
    ),
    "openai-gpt": (
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "bart": ("BartForCausalLM", "BartConfig", DECODER),
}


def make(name: str) -> Any:
    """The model; None where transformers does not have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own, on import
        import transformers

        transformers.logging.set_verbosity_error()
        model_class, config_class, options = CONFIGURATIONS[name]
        if not hasattr(transformers, model_class):
            return None
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
    for param in model.parameters():  # some are left as they were in memory, for a checkpoint to fill
        torch.nn.init.normal_(param, 1.0 if param.dim() == 1 else 0.0, 0.2)
    return model


def token_ids(samples: int, length: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(length))
