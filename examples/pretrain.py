"""Trains a small LLaMA from scratch: Muon for the matrices of its blocks, AdamW for the rest, all states in 8 bits.

    pip install ".[examples]"
    python examples/pretrain.py

Takes two minutes on one core. The text is the source of Python's standard library, byte by byte.
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import opt8bit

BATCH, LENGTH, STEPS, LR = 16, 128, 300, 2e-3
SHAPE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}


def windows(data: torch.Tensor, count: int, seed: int) -> torch.Tensor:  # (count, LENGTH), from anywhere
    starts = torch.randint(len(data) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    return data[starts + torch.arange(LENGTH)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three steps: to see that it runs")
    steps = 3 if parser.parse_args().quick else STEPS

    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    train, valid = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **SHAPE))
    # Its gradients are unlike all others: it has a layer norm, and keeps its own states in 32 bits.
    model.set_input_embeddings(opt8bit.StableEmbedding(256, SHAPE["hidden_size"]))
    # Given a model, it chooses by names and shapes: embedding, head and norms go to AdamW.
    optimizer = opt8bit.MuonAdamW8bit(model, lr=LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS + 1, cycle_momentum=False)

    for step in range(1, steps + 1):
        batch = windows(train, BATCH, seed=step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                unseen = windows(valid, 64, seed=0)
                print(f"step {step}: validation loss {model(input_ids=unseen, labels=unseen).loss:.3f} nats a byte")
    print(opt8bit.memory_report(optimizer))
