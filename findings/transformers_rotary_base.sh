#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6: what version 5 saves, version 4 loads with another rotary embedding.
#
# Version 5 writes the embedding's base and scaling as `rope_parameters` alone. Version 4 looks for `rope_theta` and
# `rope_scaling`, finds neither and takes its defaults: 10,000 in place of LLaMA 3's 500,000, and no scaling. Nothing is
# said; logits are others.
# Expected: version 5 also writes the names by which all earlier ones read it, or version 4.57.6, released beside it,
# reads the new one.
# Why it matters: a model that is fine-tuned, converted or quantized with version 5 goes to servers and tools that are
# pinned to version 4. It loads there, and is worse the longer the text.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6
finding <<'PYTHON'
import json

import torch
import transformers

rope = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
torch.manual_seed(0)
config = transformers.LlamaConfig(
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 256, "rope_parameters": rope, "initializer_range": 0.2},
)
model = transformers.LlamaForCausalLM(config).eval()
model.save_pretrained("llama")
with torch.no_grad():
    torch.save(model(torch.arange(64)[None]).logits, "logits.pt")
written = json.loads(open("llama/config.json").read())
print(f"{transformers.__version__} writes:", sorted(name for name in written if name.startswith("rope")))
assert "rope_parameters" in written and "rope_theta" not in written and "rope_scaling" not in written
PYTHON
older=(transformers==4.57.6 numpy==2.4.6)
environment/bin/python -m pip install -q --target older "${older[@]}" 2>errors || { cat errors >&2; exit 1; }
PYTHONPATH="$folder/older" finding <<'PYTHON'
import logging
import warnings

import torch
import transformers

records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("transformers").addHandler(handler)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = transformers.AutoModelForCausalLM.from_pretrained("llama").eval()
said = [*(record.getMessage() for record in records), *(str(each.message) for each in caught)]
about_rope = [text for text in said if "rop" in text or "rotary" in text]
print(f"{transformers.__version__} takes: rope_theta {model.config.rope_theta}, rope_scaling {model.config.rope_scaling}")
print(f"warnings of it: {len(about_rope)}")
assert model.config.rope_theta == 10000.0 and model.config.rope_scaling is None and not about_rope
with torch.no_grad():
    expected, found = torch.load("logits.pt"), model(torch.arange(64)[None]).logits
off = [((found - expected)[0, i].norm() / expected[0, i].norm()).item() for i in (0, 7, 63)]
print("logits are off by " + ", ".join(f"{each:.0%}" for each in off) + " at the first, 8th and 64th token")
assert off[0] < 1e-3 < 0.05 < off[2]
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, transformers 5.24.0, numpy 2.4.6
#   5.24.0 writes: ['rope_parameters']
#   4.57.6 takes: rope_theta 10000.0, rope_scaling None
#   warnings of it: 0
#   logits are off by 0%, 56%, 57% at the first, 8th and 64th token
