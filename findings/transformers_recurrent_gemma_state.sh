#!/usr/bin/env bash
# transformers 4.57.6: RecurrentGemma keeps the state of its last call, also with use_cache=False, and stumbles over it.
#
# Each recurrent block stores its last state in the module, and the next call begins with it, although a sequence begins
# anew. That of a batch of two does not fit a batch of one: a RuntimeError. A new model takes the same batch.
# Expected: without a cache calls are independent, as in transformers 5.24.0.
# Why it matters: the last batch of an evaluation is often smaller than the others.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 transformers==4.57.6 numpy==2.4.6
finding <<'PYTHON'
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

config = RecurrentGemmaConfig(
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "lru_width": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "attention_window_size": 8, "use_cache": False},
)
ids = torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(0))


def states(model):
    return [m.recurrent_states.shape for m in model.modules() if getattr(m, "recurrent_states", None) is not None]


with torch.no_grad():
    model = RecurrentGemmaForCausalLM(config).eval()
    model(ids[4:], use_cache=False)
    print("a batch of one, in a new model: runs")

    model = RecurrentGemmaForCausalLM(config).eval()
    for batch in ids.split(2):
        try:
            model(batch, use_cache=False)
            error = None
        except RuntimeError as raised:
            error = raised
        kept = sorted({tuple(shape) for shape in states(model)})
        print(f"a batch of {len(batch)}: {'runs' if error is None else f'RuntimeError: {error}'}; kept: {kept}")
        assert kept == [(2, 32)] and (error is None) == (len(batch) == 2)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, transformers 4.57.6, numpy 2.4.6
#   a batch of one, in a new model: runs
#   a batch of 2: runs; kept: [(2, 32)]
#   a batch of 2: runs; kept: [(2, 32)]
#   a batch of 1: RuntimeError: The expanded size of the tensor (1) must match the existing size (2) at non-singleton dimension 0.  Target sizes: [1, 32].  Tensor sizes: [2, 32]; kept: [(2, 32)]
