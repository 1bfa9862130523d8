#!/usr/bin/env bash
# transformers 4.57.6: Gemma 2's attention leaves out the soft cap of its logits, unless it is asked to be "eager".
#
# config.json says attn_logit_softcapping 50, and the model hands it to its attention. The one that from_pretrained takes
# by default, "sdpa", swallows it with all other arguments that it does not know. Nothing is said.
# Expected: the cap is applied, or "sdpa" refused, as in transformers 5.24.0, which takes "eager".
# Why it matters: where scores come near the cap it is another model than the one that was trained, and the two versions
# disagree about it: a checkpoint that is compressed with one and checked with the other seems to be damaged.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 transformers==4.57.6 numpy==2.4.6
finding <<'PYTHON'
import logging
import warnings

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("transformers").addHandler(handler)
warnings.simplefilter("error")

torch.manual_seed(0)
config = Gemma2Config(
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "initializer_range": 0.8},
)
Gemma2ForCausalLM(config).save_pretrained("capped")
ids = torch.arange(24)[None]


def logits(cap, **options):
    """Returns what the same weights compute with a cap and without."""
    config = Gemma2Config.from_pretrained("capped", attn_logit_softcapping=cap)
    model = AutoModelForCausalLM.from_pretrained("capped", config=config, **options).eval()
    with torch.no_grad():
        return model.config._attn_implementation, model(ids).logits


default, capped = logits(50.0)
uncapped = logits(None)[1]
eager = logits(50.0, attn_implementation="eager")[1]
print(f"by default ({default}): with a cap of 50 and without the same logits: {torch.equal(capped, uncapped)}")
off = ((capped - eager).norm() / eager.norm()).item()
print(f"with attn_implementation='eager' they are {off:.1%} away")
messages = [record.getMessage() for record in records if "cap" in record.getMessage()]
print(f"warnings of it: {len(messages)}")
assert default == "sdpa" and torch.equal(capped, uncapped) and off > 0.01 and not messages
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, transformers 4.57.6, numpy 2.4.6
#   by default (sdpa): with a cap of 50 and without the same logits: True
#   with attn_implementation='eager' they are 1.5% away
#   warnings of it: 0
