"""How much memory does a training take, and how large is its checkpoint, with each optimizer?

    pip install ".[bench,compress,demo]" && python benchmarks/training_memory.py

A LLaMA-type model of SmolLM2's shape, 135 million parameters of random float32 weights, takes three AdamW steps on one
window of 128 tokens, in a process of its own for each optimizer. Reported are the peak of the process's resident memory
and the peak above what it had before the model was made (torchao's compiler is loaded later), the bytes of the
optimizer's states, and those of a file with the state dicts of model and optimizer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, complete, peak_bytes, plot
from peers import adamw
from torch import Tensor

MAKERS = adamw()
SIZE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
QUICK = {**SIZE, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}


def bytes_of(value: Any) -> int:
    """Of the tensors in a state, also of those that a class of tensors is made of."""
    if not isinstance(value, Tensor):
        return 0
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is not None:
        names, _ = flatten()
        return sum(bytes_of(getattr(value, name)) for name in names)
    return value.numel() * value.element_size()


def trained(size: dict[str, Any], optimizer_name: str) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = peak_bytes()
    model: Any = LlamaForCausalLM(LlamaConfig(**size))
    optimizer = MAKERS[optimizer_name](model.parameters(), lr=1e-4)
    ids = torch.randint(size["vocab_size"], (1, 128))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    peak = peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        saved = file.stat().st_size
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "peak_bytes": peak,
        "peak_bytes_above_start": peak - before,
        "state_bytes": sum(bytes_of(value) for state in optimizer.state.values() for value in state.values()),
        "checkpoint_bytes": saved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = arguments(parser, "training_memory")

    def measure(optimizer: str) -> list[dict[str, Any]]:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return [pool.submit(trained, QUICK if options.quick else SIZE, optimizer).result()]

    rows = complete(options.rows, [{"optimizer": name} for name in MAKERS], measure)
    columns = ("peak_bytes", "peak_bytes_above_start", "state_bytes", "checkpoint_bytes")
    print(f"\n{'MB':<24}{'peak':>10}{'above start':>14}{'states':>10}{'checkpoint':>12}")
    for row in rows:
        peak, above, states, saved = (row[column] / 1e6 for column in columns)
        print(f"{row['optimizer']:<24}{peak:>10.0f}{above:>14.0f}{states:>10.0f}{saved:>12.0f}")
    with plot(options.rows, len(columns)) as axes:
        for axis, column in zip(axes, columns, strict=False):
            axis.barh([row["optimizer"] for row in rows], [row[column] / 1e6 for row in rows])
            axis.set_title(f"{column.replace('_bytes', '').replace('_', ' ')}, MB")
            axis.invert_yaxis()


if __name__ == "__main__":
    main()
