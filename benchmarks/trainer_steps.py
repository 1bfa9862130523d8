"""Does the way in which the Trainer finds an optimizer change its speed?

    pip install ".[compress]"
    python benchmarks/trainer_steps.py [--steps 60] [--rounds 7]

transformers' Trainer trains a small LLaMA, in turn: with ``optim="adamw_8bit"`` through the stand-in for bitsandbytes,
and with ``opt8bit.AdamW8bit`` given as ``optimizer_cls_and_kwargs``, embeddings in 32 bits in both. Prints steps per
second, medians of the rounds, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import machine
from torch import nn

import opt8bit
from opt8bit.integrations.bitsandbytes import install, uninstall

WIDTH, BLOCKS, VOCABULARY = 256, 6, 2048


class Clock(transformers.TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


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


def steps_per_second(is_line: bool, steps: int, folder: Path) -> float:
    """Trains, and returns how fast, the first fifth of the steps left out."""
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
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, opt8bit.AdamW8bit)
    kept = clock.times[steps // 5 :]
    return (len(kept) - 1) / (kept[-1] - kept[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60, help="of each training run")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each")
    parser.add_argument("--quick", action="store_true", help="two short rounds, to see that it runs")
    options = parser.parse_args()
    steps, rounds = (5, 2) if options.quick else (options.steps, options.rounds)
    print(machine())
    speeds: dict[bool, list[float]] = {True: [], False: []}
    install()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for is_line in (True, False):
                speed = steps_per_second(is_line, steps, Path(folder))
                if turn:  # the first does not count
                    speeds[is_line].append(speed)
    uninstall()
    line, given = (statistics.median(speeds[is_line]) for is_line in (True, False))
    ratios = [one / other for one, other in zip(speeds[True], speeds[False], strict=True)]
    print(f'optim="adamw_8bit", through the stand-in   {line:8.2f} steps/s')
    print(f"opt8bit.AdamW8bit, given directly          {given:8.2f} steps/s")
    print(f"ratio {line / given:.3f} (of pairs of runs: {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
