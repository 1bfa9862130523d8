#!/usr/bin/env bash
# transformers 5.24.0: `model.config.use_cache = False` switches nothing off in models with a text_config, such as Gemma 3.
#
# A composite configuration has no use_cache itself: to read it is an AttributeError, to set it is silently in vain, as
# the text model reads its own. A plain forward so makes and returns a cache. The model of Gemma 3 without images obeys.
# Expected: the switch of the model's configuration is the model's, or cannot be set.
# Why it matters: training scripts set it, for the cache takes memory and does not go with gradient checkpointing; and
# what calls blocks again with the arguments that it has recorded attends to the tokens of its earlier calls.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6
finding <<'PYTHON'
import torch
import transformers

TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "pad_token_id": 0},
}
VISION = {
    **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
text = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))
config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
composite = transformers.Gemma3ForConditionalGeneration(config)

for model in (text, composite):
    name = type(model).__name__
    had = getattr(model.config, "use_cache", "none")
    model.config.use_cache = False
    with torch.no_grad():
        cache = model(input_ids=torch.arange(12)[None]).past_key_values
    print(f"{name}: config.use_cache {had}; set to False, a forward returns {type(cache).__name__}")
    assert (had, cache is None) == ((True, True) if model is text else ("none", False))

composite.config.text_config.use_cache = False
with torch.no_grad():
    cache = composite(input_ids=torch.arange(12)[None]).past_key_values
print(f"with config.text_config.use_cache set to False it returns {type(cache).__name__}")
assert cache is None
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, transformers 5.24.0, numpy 2.4.6
#   Gemma3ForCausalLM: config.use_cache True; set to False, a forward returns NoneType
#   Gemma3ForConditionalGeneration: config.use_cache none; set to False, a forward returns DynamicCache
#   with config.text_config.use_cache set to False it returns NoneType
