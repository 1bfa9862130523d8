"""Defines what the ``opt8bit`` command accepts: its commands and their options. Needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import opt8bit
from opt8bit.cli.completion import SHELLS
from opt8bit.cli.demo_settings import DemoSettings
from opt8bit.cli.flags import HelpFormatter, add_flags, add_old_flags, at_least, number
from opt8bit.cli.overview import COMMANDS, overview
from opt8bit.cli.run_options import BOS, DTYPES, LENGTH, TEXT_OPTIONS, WINDOWS, CorrectionOptions, RunOptions
from opt8bit.recipe import Recipe
from opt8bit.recipe.names import RENAMED
from opt8bit.recipe.options import options_of
from opt8bit.recipe.registry import FORMATS

TEXTS = "a file of text or records, a folder of them, or owner/name:config:split of the datasets package"
COLUMN = "of records, with the text or the chat (default: text, messages or conversations)"
TRUST = "run Python files that come with the model"
MEMORY_DTYPES = ("config", *DTYPES, "float64")
SET_UP_COMPLETION = (
    'In ~/.bashrc: eval "$(opt8bit completion bash)". In ~/.zshrc, after compinit: eval "$(opt8bit completion zsh)". '
    "In fish: opt8bit completion fish > ~/.config/fish/completions/opt8bit.fish"
)


def parser() -> argparse.ArgumentParser:
    """Returns what reads the command line."""
    top = argparse.ArgumentParser(
        prog="opt8bit",
        usage="opt8bit COMMAND [ARGUMENT ...]",
        description=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(
        dest="command", required=True, prog="opt8bit", metavar="COMMAND", help=argparse.SUPPRESS
    )
    _add(commands, "info")
    _add_demo(commands)
    _add_memory(commands)
    _add_compress(commands)
    _add_correct(commands)
    _add_convert(commands)
    check = _add(commands, "verify")
    check.add_argument("folder", metavar="DIR", help="that opt8bit compress or correct has written")
    check.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    look = _add(commands, "inspect")
    look.add_argument("folder", type=Path, metavar="DIR", help="with a config.json and weights in safetensors")
    _add_report(commands)
    _add_evaluate(commands)
    _add_run(commands)
    _add_completion(commands)
    return top


class _Version(argparse.Action):
    """Prints the version, which is looked up only here: that takes as long as the rest of the help."""

    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> None:
        print(f"opt8bit {opt8bit.__version__}")
        parser.exit()


def _add(commands: argparse._SubParsersAction, name: str, **about: Any) -> argparse.ArgumentParser:
    """Adds a command. The overview lists it, so that argparse's own list stays empty."""
    words = COMMANDS[name]
    about = {"formatter_class": HelpFormatter, **about}
    return commands.add_parser(name, description=f"{words[0].upper()}{words[1:]}.", **about)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    add = _add(commands, "demo").add_argument
    add("--text", type=Path, help="file to train on (default: Python's standard library)")
    add("--steps", type=at_least(2), default=DemoSettings.steps, help="training steps of each run")
    add("--seed", type=number(options_of(RunOptions)["seed"]), default=DemoSettings.seed, help="of weights and batches")
    add("--plot", type=Path, default=Path("opt8bit-demo.png"), help="where to save the loss curves")


def _add_memory(commands: argparse._SubParsersAction) -> None:
    add = _add(commands, "memory").add_argument
    add("model", metavar="MODEL", help="folder with a config.json, or id of a model on the hub")
    add("--dtype", choices=MEMORY_DTYPES, default="config", help="of the parameters")
    add("--block-size", type=int, help="elements per block of an 8-bit state (default: the optimizers' own)")
    add("--min-8bit-size", type=int, help="smaller tensors keep their states in full (default: the optimizers' own)")
    add("--ranks", type=at_least(1), default=1, help="processes that share the parameters, as FSDP2 does")


def _add_compress(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "compress")
    add = command.add_argument
    add("model", metavar="MODEL", help="folder with a checkpoint in safetensors, or id of a model on the hub")
    add("--calibration", required=True, metavar="TEXT", help=f"like what the model is for: {TEXTS}")
    add("--text-column", metavar="NAME", help=COLUMN)
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    add_flags(command.add_argument_group("rounding and correction"), Recipe)
    add_flags(command.add_argument_group("calibration text and checkpoint"), RunOptions)
    add_old_flags(command, RENAMED)
    add("--recipe", type=Path, metavar="FILE", help="options in JSON, and others for single layers; flags go first")
    add("--resume", action="store_true", help="go on with a run that ended before it was done")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="load the result back and compare")
    add("--trust-remote-code", action="store_true", help=TRUST)


def _add_correct(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "correct")
    add = command.add_argument
    layouts = "in the layout of compressed-tensors, GPTQ or AWQ"
    places = f"folder with a checkpoint {layouts}, id of a model on the hub, or ONNX file"
    add("checkpoint", metavar="CHECKPOINT", help=places)
    base = "the float model that it was made of: a folder, an id, or for an ONNX file another one"
    add("--reference", required=True, metavar="BASE", help=base)
    arrays = "; for an ONNX file also arrays by the names of its inputs, in an .npz file or a folder of them"
    add("--calibration", required=True, metavar="TEXT", help=f"like what the model is for: {TEXTS}{arrays}")
    add("--text-column", metavar="NAME", help=COLUMN)
    add("--tokenizer", metavar="FOLDER", help="or id (default: that of BASE, or beside it)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder or ONNX file to write; it must not exist")
    add_flags(command, CorrectionOptions)
    add_flags(command, RunOptions, TEXT_OPTIONS)
    add("--again", action="store_true", help="correct further what has been corrected before")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="load the result back and compare")
    add("--trust-remote-code", action="store_true", help=TRUST)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    add = _add(commands, "convert").add_argument
    layouts = "in the layout of compressed-tensors, GPTQ, AWQ, AutoRound or MLX"
    add("model", metavar="DIR", help=f"folder with a checkpoint {layouts}, or id of a model on the hub")
    add("--format", required=True, choices=tuple(FORMATS), help="of the checkpoint to write")
    add("--output", type=Path, required=True, metavar="OUT", help="folder to write; it must not exist")
    add("--round-again", action="store_true", help="round what the format cannot hold as it is to nearest, once more")
    add("--trust-remote-code", action="store_true", help=TRUST)


def _add_report(commands: argparse._SubParsersAction) -> None:
    add = _add(commands, "report").add_argument
    add("folder", type=Path, metavar="DIR", help="that opt8bit compress has written")
    add("--output", type=Path, default=Path("report.html"), metavar="FILE", help="to write; it must not exist")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "evaluate")
    add = command.add_argument
    add("model", metavar="MODEL", help="folder with a checkpoint in safetensors, or id of the hub")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="TEXT", help=f"to predict: {TEXTS}")
    what.add_argument("--tasks", metavar="NAME,...", help="of lm-eval, which runs them")
    add("--task-folder", type=Path, metavar="DIR", help="with task files of your own, for --tasks")
    add("--limit", type=at_least(1), metavar="N", help="documents of each task (default: all), for --tasks")
    add("--text-column", metavar="NAME", help=COLUMN)
    add(
        "--sequence-length",
        type=at_least(1),
        metavar="N",
        help=f"tokens of a window; windows do not overlap (default: {LENGTH})",
    )
    add("--samples", type=at_least(1), metavar="N", help=f"windows, from the start of the text (default: {WINDOWS})")
    add("--bos", action="store_true", help=BOS)
    add("--json", action="store_true", help="print one line of JSON")
    add("--trust-remote-code", action="store_true", help=TRUST)


def _add_run(commands: argparse._SubParsersAction) -> None:
    usage = "opt8bit run SCRIPT [ARGUMENT ...]\n       opt8bit run -m MODULE [ARGUMENT ...]"
    command = _add(commands, "run", usage=usage, epilog="ARGUMENTs are those of the script or module.")
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("-m", dest="module", metavar="MODULE", help="name of a module, run as python -m does")
    target.add_argument("script", metavar="SCRIPT", nargs="?", help="file, or folder or zip file with a __main__.py")


def _add_completion(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "completion", epilog=SET_UP_COMPLETION)
    command.add_argument("shell", choices=tuple(SHELLS), help="that is to complete")
