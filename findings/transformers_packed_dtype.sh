#!/usr/bin/env bash
# transformers 4.57.6: packed checkpoints that say bfloat16 are loaded in float16, where their activations may overflow.
#
# from_pretrained without `dtype=` takes float16 for any checkpoint of compressed-tensors, whatever its config.json says,
# and logs that at the level of info only. A LLaMA whose hidden states reach 1e5, which bfloat16 holds, so computes NaN.
# With dtype="auto" or torch.bfloat16 the same checkpoint is right; without packed weights it loads in float32, and is.
# Expected: the dtype that was saved, as in transformers 5.24.0; or float32, as for all other checkpoints of 4.57.6.
# Why it matters: large models that were trained in bfloat16 have hidden states of that size. Packed by one tool, they
# are broken by a plain load.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" \
    torch==2.13.0 transformers==4.57.6 compressed-tensors==0.17.1 accelerate==1.15.0 numpy==2.4.6
finding <<'PYTHON'
import json
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
HEADER = {
    **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"}},
    "ignore": ["lm_head"],
}
torch.manual_seed(0)
config = transformers.LlamaConfig(
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
with torch.no_grad():
    model.model.embed_tokens.weight *= 1e5 / model.model.embed_tokens.weight.abs().max()
folders = Path("dense"), Path("packed")
for folder in folders:
    model.save_pretrained(folder)
tensors = model.state_dict()
for name in [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]:
    if name == "lm_head":
        continue
    weight = tensors.pop(f"{name}.weight")
    scale = weight.abs().amax(1, keepdim=True) / 127
    tensors[f"{name}.weight_packed"] = pack_to_int32((weight / scale).round().clamp(-128, 127).to(torch.int8), 8)
    tensors[f"{name}.weight_scale"] = scale
    tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
save_file(tensors, "packed/model.safetensors", {"format": "pt"})
written = json.loads(Path("packed/config.json").read_text())
Path("packed/config.json").write_text(json.dumps({**written, "quantization_config": HEADER}))

for folder, options in ((folders[0], {}), (folders[1], {}), (folders[1], {"dtype": "auto"})):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        logits = loaded(torch.arange(12)[None]).logits
    nan = logits.isnan().float().mean().item()
    print(f"{folder}, saved in {written['dtype']}, from_pretrained({options or ''}): {loaded.dtype}, NaN {nan:.0%}")
    plain = folder == folders[1] and not options
    assert written["dtype"] == "bfloat16" and (loaded.dtype == torch.float16) == plain and nan == (1 if plain else 0)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, transformers 4.57.6, compressed-tensors 0.17.1, accelerate 1.15.0, numpy 2.4.6
#   dense, saved in bfloat16, from_pretrained(): torch.float32, NaN 0%
#   packed, saved in bfloat16, from_pretrained(): torch.float16, NaN 100%
#   packed, saved in bfloat16, from_pretrained({'dtype': 'auto'}): torch.bfloat16, NaN 0%
