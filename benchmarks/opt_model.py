"""Trains a small OPT-type language model on the source of Python's standard library, with this package's own optimizer.

    pip install ".[compress]" && python benchmarks/opt_model.py FOLDER

A trained model with biases and LayerNorm, as in the paper on Bias Compensation, where no weights can be downloaded.
FOLDER gets the checkpoint in ``model``, and two texts that it was not trained on: ``calibration.txt``, ``test.txt``.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import opt8bit

VOCABULARY, LENGTH = 2048, 256
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "ffn_dim": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 256,
    "max_position_embeddings": LENGTH,
    "dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
BATCH, LR, WARMUP = 16, 2e-3, 50


def texts() -> tuple[str, str, str]:
    """For training, for calibration and for the test: modules of the standard library, every tenth and twentieth."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]
    train = [text for i, text in enumerate(modules) if i % 10]
    return "".join(train), "".join(modules[0::20]), "".join(modules[10::20])


def tokenizer_of(text: str) -> Any:
    """A byte-level tokenizer, so that no text is foreign to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator([text], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def train(ids: torch.Tensor, steps: int, seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**CONFIG)).train()
    embeddings = list(model.get_input_embeddings().parameters())
    others = [param for param in model.parameters() if all(param is not one for one in embeddings)]
    groups = [{"params": others}, {"params": embeddings, "state_bits": 32}]
    optimizer = opt8bit.AdamW8bit(groups, lr=LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    started = time.perf_counter()
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1))
        window = ids[starts + torch.arange(LENGTH)]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(
                f"step {step} of {steps}, loss {float(loss.detach()):.3f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    text, calibration, test = texts()
    tokenizer = tokenizer_of(text)
    model = train(torch.tensor(tokenizer(text, verbose=False)["input_ids"]), options.steps, options.seed)
    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")
    (options.folder / "calibration.txt").write_text(calibration)
    (options.folder / "test.txt").write_text(test)


if __name__ == "__main__":
    main()
