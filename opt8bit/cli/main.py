"""The ``opt8bit`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from opt8bit import __version__
from opt8bit.cli import compress, demo, evaluate, info, inspect, memory, verify
from opt8bit.cli.models import DTYPES, CommandError
from opt8bit.cli.recipes import METHODS, STATISTICS, read_recipe
from opt8bit.cli.texts import find_text
from opt8bit.optim.options import DEFAULTS
from opt8bit.ptq.bias import CORRECTIONS
from opt8bit.ptq.export import FORMATS
from opt8bit.ptq.methods.outliers import STRUCTURES
from opt8bit.quant.grid import RANGES

TEXTS = "a file of text or records, a folder of them, or owner/name:config:split of the datasets package"
COLUMN = "of records, with the text or the chat (default: text, messages or conversations)"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


positive = at_least(1)


def seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:  # what torch takes
        raise argparse.ArgumentTypeError(f"must be from -2**63 to 2**64 - 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="opt8bit", description="8-bit optimizer states; compressed, corrected weights.")
    top.add_argument("--version", action="version", version=f"opt8bit {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print version, processor and which backend serves each device")
    train = commands.add_parser(
        "demo",
        help="train a small GPT twice, with torch.optim.AdamW and with opt8bit.AdamW8bit, and compare",
        formatter_class=HelpFormatter,
    )
    train.add_argument("--text", type=Path, help="file to train on (default: Python's standard library)")
    train.add_argument("--steps", type=at_least(2), default=demo.Settings.steps, help="training steps of each run")
    train.add_argument("--seed", type=seed, default=demo.Settings.seed, help="of weights and batches")
    train.add_argument("--plot", type=Path, default=Path("opt8bit-demo.png"), help="where to save the loss curves")
    sizes = commands.add_parser(
        "memory",
        help="print what a model's weights, gradients and optimizer states take, at 32 and at 8 bits",
        formatter_class=HelpFormatter,
    )
    sizes.add_argument("model", metavar="MODEL", help="folder with a config.json, or id of a model on the hub")
    sizes.add_argument("--dtype", choices=memory.DTYPES, default="config", help="of the parameters")
    block_size, least = DEFAULTS.get("block_size"), DEFAULTS.get("min_8bit_size")
    sizes.add_argument("--block-size", type=int, default=block_size, help="elements per block of an 8-bit state")
    sizes.add_argument("--min-8bit-size", type=int, default=least, help="smaller tensors keep their states in full")
    sizes.add_argument("--ranks", type=positive, default=1, help="processes that share the parameters, as FSDP2 does")
    add_compress(commands)
    check = commands.add_parser("verify", help="load a compressed checkpoint, and compare it with what was made")
    check.add_argument("folder", metavar="DIR", help="that opt8bit compress has written")
    check.add_argument("--trust-remote-code", action="store_true", help="run Python files that come with the model")
    look = commands.add_parser("inspect", help="print what is inside a checkpoint")
    look.add_argument("folder", type=Path, metavar="DIR", help="with a config.json and weights in safetensors")
    test = commands.add_parser(
        "evaluate",
        help="print the perplexity of a language model on a text",
        formatter_class=HelpFormatter,
    )
    test.add_argument("model", metavar="MODEL", help="folder with a checkpoint in safetensors, or id of the hub")
    test.add_argument("--text", required=True, metavar="TEXT", help=f"to predict: {TEXTS}")
    test.add_argument("--text-column", metavar="NAME", help=COLUMN)
    test.add_argument(
        "--sequence-length", type=positive, default=512, help="tokens of a window; windows do not overlap"
    )
    test.add_argument("--samples", type=positive, default=20, help="windows, from the start of the text")
    test.add_argument("--json", action="store_true", help="print one line of JSON")
    test.add_argument("--trust-remote-code", action="store_true", help="run Python files that come with the model")
    return top


def add_compress(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compress",
        help="round a trained language model's weights to 2-8 bits, and write it",
        formatter_class=HelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="folder with a checkpoint in safetensors, or id of a model on the hub")
    add("--calibration", required=True, metavar="TEXT", help=f"like what the model is for: {TEXTS}")
    add("--text-column", metavar="NAME", help=COLUMN)
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    add("--method", choices=METHODS, default="gptq", help="that rounds")
    add("--bits", type=int, choices=range(2, 9), default=4, metavar="N", help="of a weight, 2 to 8")
    groups = (
        "weights of a row that share a scale; 0 for whole rows (default: what divides all layers, of 64, 32, 16 and 0)"
    )
    add("--group-size", type=int, metavar="N", help=groups)
    symmetric = "grids with a fixed zero point (default: at 4 and 8 bits, as servers ask for it, but for dense)"
    add("--symmetric", action=argparse.BooleanOptionalAction, help=symmetric)
    add("--range", choices=RANGES, help="of a grid (default: mse; minmax for rtn)")
    add("--correct", choices=CORRECTIONS, default="none", help="errors that Bias Compensation makes up for")
    add("--statistic", choices=STATISTICS, default="mean", help="of the errors")
    polish = "coordinate descent and refitted scales after rounding (default: for all but rtn)"
    add("--polish", action=argparse.BooleanOptionalAction, help=polish)
    add("--outliers", type=float, default=0.0, metavar="F", help="fraction of the weights to keep exact")
    structure = "single weights, or whole inputs (default: unstructured)"
    add("--outlier-structure", choices=STRUCTURES, help=structure)
    order = "GPTQ by falling second moment of the inputs (default: yes)"
    add("--act-order", action=argparse.BooleanOptionalAction, help=order)
    strength = "strength of the asymmetric target, 0 to 1 (default: 0.5; 0 for rtn and local)"
    add("--error-propagation", type=float, metavar="ALPHA", help=strength)
    add("--samples", type=positive, default=64, metavar="N", help="windows of the calibration text")
    add("--sequence-length", type=positive, default=512, metavar="N", help="tokens of a window")
    kept = "windows of the rest of the calibration text that tell how good the result is"
    add("--held-out", type=at_least(0), default=8, metavar="N", help=kept)
    add("--format", choices=FORMATS, default="compressed-tensors", help="of the checkpoint")
    add("--seed", type=seed, default=0, metavar="N", help="of the choice of windows; 0 takes the first ones")
    computed = "to compute the model in, and to name in the result's config.json (default: the model's own)"
    add("--dtype", choices=DTYPES, help=computed)
    add("--recipe", type=Path, metavar="FILE", help="options in JSON, and others for single layers; flags go first")
    add("--resume", action="store_true", help="go on with a run that ended before it was done")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="load the result back and compare")
    add("--trust-remote-code", action="store_true", help="run Python files that come with the model")


def run_info(options: argparse.Namespace) -> None:
    print(info.report())


def run_demo(options: argparse.Namespace) -> None:
    demo.run(demo.Settings(steps=options.steps, seed=options.seed), options.text, options.plot)


def run_memory(options: argparse.Namespace) -> None:
    print(memory.report(options.model, options.dtype, options.block_size, options.min_8bit_size, options.ranks))


def run_compress(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if name not in ("command", "recipe")}
    compress.run(compress.Settings(**given))


def run_verify(options: argparse.Namespace) -> None:
    verify.run(options.folder, options.trust_remote_code)


def run_inspect(options: argparse.Namespace) -> None:
    print(inspect.report(options.folder))


def run_evaluate(options: argparse.Namespace) -> None:
    length, samples = options.sequence_length, options.samples
    text = find_text(options.text, options.text_column)
    print(evaluate.report(options.model, text, length, samples, options.json, options.trust_remote_code))


COMMANDS = {
    "info": run_info,
    "demo": run_demo,
    "memory": run_memory,
    "compress": run_compress,
    "evaluate": run_evaluate,
    "verify": run_verify,
    "inspect": run_inspect,
}


def with_recipe(options: argparse.Namespace, arguments: list[str]) -> argparse.Namespace:
    """The options of a recipe file, but where the command line has others."""
    words, overrides = read_recipe(options.recipe)
    options = parser().parse_args([arguments[0], *words, *arguments[1:]])
    options.overrides = overrides
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        if getattr(options, "recipe", None) is not None:
            options = with_recipe(options, arguments)
        COMMANDS[options.command](options)
    except (CommandError, demo.DemoError, memory.ModelError) as error:
        print(f"opt8bit {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"opt8bit {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0
