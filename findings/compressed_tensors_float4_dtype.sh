#!/usr/bin/env bash
# compressed-tensors 0.20.1 with transformers 5.24.0: NVFP4 and MXFP4 checkpoints of float16 and float32 models load, and
# then fail on the first token.
#
# The decompressor of 4-bit floats returns bfloat16 whatever the layer's dtype is. All else in the model keeps its own,
# so that the first linear layer multiplies float16 by bfloat16. Integers (W4A16) run in all three dtypes.
# Expected: weights in the dtype of the scheme's layer, as for integers.
# Why it matters: such a checkpoint is written without a word. With "dequantize": true in its header it runs.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" \
    torch==2.13.0 compressed-tensors==0.20.1 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
finding <<'PYTHON'
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}


def outcome(preset, dtype):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):  # one that fits all of these weights; the outcome depends on no value
            module.weight_scale.data.fill_(124 if module.weight_scale.dtype == torch.uint8 else 0.01)
        if hasattr(module, "weight_global_scale"):
            module.weight_global_scale.data.fill_(1.0)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained("packed")
    compressor.update_config("packed")
    loaded = AutoModelForCausalLM.from_pretrained("packed", dtype="auto")
    try:
        return str(loaded(torch.arange(8)[None]).logits.dtype)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


for preset in ("W4A16", "NVFP4A16", "MXFP4A16"):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = outcome(preset, dtype)
        print(f"{preset}, a model in {dtype}: {found}")
        runs = preset == "W4A16" or dtype == torch.bfloat16
        assert found == str(dtype) if runs else "same dtype" in found
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, compressed-tensors 0.20.1, transformers 5.24.0, accelerate 1.15.0, numpy 2.4.6
#   W4A16, a model in torch.bfloat16: torch.bfloat16
#   W4A16, a model in torch.float16: torch.float16
#   W4A16, a model in torch.float32: torch.float32
#   NVFP4A16, a model in torch.bfloat16: torch.bfloat16
#   NVFP4A16, a model in torch.float16: RuntimeError: expected m1 and m2 to have the same dtype, but got: c10::Half != c10::BFloat16
#   NVFP4A16, a model in torch.float32: RuntimeError: expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16
#   MXFP4A16, a model in torch.bfloat16: torch.bfloat16
#   MXFP4A16, a model in torch.float16: RuntimeError: expected m1 and m2 to have the same dtype, but got: c10::Half != c10::BFloat16
#   MXFP4A16, a model in torch.float32: RuntimeError: expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16
