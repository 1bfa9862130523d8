#!/usr/bin/env bash
# transformers 5.24.0: from_pretrained(gguf_file=...) drops the biases of a LLaMA file, and LLaMA 3's rotary embedding.
#
# llama.cpp's LLaMA architecture has a place for a bias behind each projection, and a tensor `rope_freqs.weight`, by which
# it divides the frequencies of LLaMA 3's rotary embedding. transformers reads a file with them into a model without these
# biases, or with the plain rotary embedding, and the information on loading is empty.
# Expected: the logits of the model that was written, as without either, or an error.
# Why it matters: GGUF files are compared, dequantized and trained on through this loader. A corrected model loses its
# corrections there, and LLaMA 3.1's rotary embedding is that of another model.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
finding <<'PYTHON'
import gguf
import torch
import transformers

THETA, SIZES = 1e4, {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
HEAD = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "plain": {},
    "biases": {"attention_bias": True},
    "LLaMA 3's frequencies": {"rope_parameters": {**HEAD, "original_max_position_embeddings": 32}},
}


def made(options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, initializer_range=0.2, **SIZES, **options
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param)
    return model


def write(model, file):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(96)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp's order of a head's channels
            tensor = tensor.unflatten(0, (4, 2, 8)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.contiguous().numpy())
    plain = THETA ** -(torch.arange(0, 16, 2) / 16)
    divisors = plain / model.model.rotary_emb.inv_freq
    if not torch.allclose(divisors, torch.ones(8)):
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ids = torch.arange(60)[None]
for name, options in VARIANTS.items():
    model = made(options)
    write(model, "model.gguf")
    tensors = len(gguf.GGUFReader("model.gguf").tensors)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        ".", gguf_file="model.gguf", output_loading_info=True, dtype=torch.float32
    )
    with torch.no_grad():
        error = (loaded.eval()(ids).logits - model(ids).logits).abs().max().item()
    said = {key: value for key, value in info.items() if value}
    parameters = len(list(loaded.parameters()))
    print(f"{name}: {tensors} tensors in the file, {parameters} in the model, said {said}, logits differ by {error:.2f}")
    assert not said and (error < 1e-3) == (name == "plain"), (said, error)
PYTHON

# Output seen:
#   versions: Python 3.11.7, torch 2.13.0+cpu, transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0
#   plain: 12 tensors in the file, 12 in the model, said {}, logits differ by 0.00
#   biases: 16 tensors in the file, 12 in the model, said {}, logits differ by 9.41
#   LLaMA 3's frequencies: 13 tensors in the file, 12 in the model, said {}, logits differ by 6.52
