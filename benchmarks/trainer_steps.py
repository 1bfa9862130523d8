"""Does the way in which the Trainer finds an optimizer change its speed?

    pip install ".[compress]"
    python benchmarks/trainer_steps.py [--steps 60] [--rounds 7]

transformers' Trainer trains a small LLaMA, in turn: with ``optim="adamw_8bit"`` through the stand-in for bitsandbytes,
and with ``opt8bit.AdamW8bit`` given as ``optimizer_cls_and_kwargs``, embeddings in 32 bits in both. Prints steps per
second of the clock and of processor time, from the median step of all rounds, and their ratios. Processor time is what
counts where others work on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import show_machine
from torch import nn

import opt8bit
from opt8bit.integrations.bitsandbytes import install, uninstall

WIDTH, BLOCKS, VOCABULARY = 256, 6, 2048


class Clock(transformers.TrainerCallback):
    """Notes when steps end, by the clock and in processor time."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


def seconds_of_steps(is_line: bool, steps: int, folder: Path) -> list[tuple[float, float]]:
    """Trains, and returns the seconds of each step by both clocks, the first fifth of the steps left out."""
    trained: Any = model()
    chosen: dict[str, Any] = {"optim": "adamw_8bit"} if is_line else {}
    if not is_line:
        trained.model.embed_tokens.weight.state_bits = 32
    ids = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **chosen,
    )
    clock = Clock()
    trainer = transformers.Trainer(
        trained,
        arguments,
        train_dataset=[{"input_ids": each, "labels": each} for each in ids],
        callbacks=[clock],
        optimizer_cls_and_kwargs=None if is_line else (opt8bit.AdamW8bit, {"lr": arguments.learning_rate}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, opt8bit.AdamW8bit)
    kept = clock.times[steps // 5 :]
    return [(end[0] - start[0], end[1] - start[1]) for start, end in itertools.pairwise(kept)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60, help="of each training run")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each")
    parser.add_argument("--quick", action="store_true", help="two short rounds, to see that it runs")
    options = parser.parse_args()
    steps, rounds = (5, 2) if options.quick else (options.steps, options.rounds)
    show_machine()
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    install()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for is_line in (turn % 2 == 0, turn % 2 == 1):
                found = seconds_of_steps(is_line, steps, Path(folder))
                if turn:  # the first does not count
                    seconds[is_line] += found
    uninstall()
    for index, clock in enumerate(("clock", "processor time")):
        line, given = (1 / statistics.median(each[index] for each in seconds[is_line]) for is_line in (True, False))
        print(f'{clock}: {line:.2f} steps/s with optim="adamw_8bit", {given:.2f} with the class: {line / given:.3f}')


if __name__ == "__main__":
    main()
