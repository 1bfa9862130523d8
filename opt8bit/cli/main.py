"""The ``opt8bit`` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opt8bit.cli import demo, info, memory
from opt8bit.optim.base import DEFAULTS


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
    sizes = commands.add_parser(
        "memory",
        help="print what a model's weights, gradients and optimizer states take, at 32 and at 8 bits",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sizes.add_argument("model", metavar="MODEL", help="folder with a config.json, or id of a model on the hub")
    sizes.add_argument("--dtype", choices=memory.DTYPES, default="config", help="of the parameters")
    block_size, least = DEFAULTS.get("block_size"), DEFAULTS.get("min_8bit_size")
    sizes.add_argument("--block-size", type=int, default=block_size, help="elements per block of an 8-bit state")
    sizes.add_argument("--min-8bit-size", type=int, default=least, help="smaller tensors keep their states in full")
    return top


def run_info(options: argparse.Namespace) -> None:
    print(info.report())


def run_demo(options: argparse.Namespace) -> None:
    demo.run(demo.Settings(steps=options.steps, seed=options.seed), options.text, options.plot)


def run_memory(options: argparse.Namespace) -> None:
    print(memory.report(options.model, options.dtype, options.block_size, options.min_8bit_size))


COMMANDS = {"info": run_info, "demo": run_demo, "memory": run_memory}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except (demo.DemoError, memory.ModelError) as error:
        print(f"opt8bit {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
