"""The ``opt8bit`` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opt8bit.cli import demo, info


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="opt8bit", description="Optimizers whose states take 8 bits.")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print version, processor and which backend serves each device")
    train = commands.add_parser(
        "demo",
        help="train a small GPT twice, with torch.optim.AdamW and with opt8bit.AdamW8bit, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("--text", type=Path, help="file to train on (default: Python's standard library)")
    train.add_argument("--steps", type=positive, default=demo.Settings.steps, help="training steps of each run")
    train.add_argument("--seed", type=int, default=demo.Settings.seed, help="of weights and batches")
    train.add_argument("--plot", type=Path, default=Path("opt8bit-demo.png"), help="where to save the loss curves")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    if options.command == "info":
        print(info.report())
        return 0
    try:
        demo.run(demo.Settings(steps=options.steps, seed=options.seed), options.text, options.plot)
    except demo.DemoError as error:
        print(f"opt8bit demo: {error}", file=sys.stderr)
        return 2
    return 0
