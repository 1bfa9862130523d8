"""The ``opt8bit`` command. Its help needs no torch: each command is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opt8bit import __version__
from opt8bit.cli.demo_settings import DemoSettings
from opt8bit.cli.errors import CommandError
from opt8bit.cli.flags import HelpFormatter, add_flags, add_old_flags, at_least, given, number
from opt8bit.cli.recipes import options_from, read_recipe
from opt8bit.cli.run_options import BOS, DTYPES, TEXT_OPTIONS, CorrectionOptions, RunOptions
from opt8bit.recipe import Recipe
from opt8bit.recipe.names import RENAMED, renamed
from opt8bit.recipe.options import options_of

TEXTS = "a file of text or records, a folder of them, or owner/name:config:split of the datasets package"
COLUMN = "of records, with the text or the chat (default: text, messages or conversations)"
TRUST = "run Python files that come with the model"
MEMORY_DTYPES = ("config", *DTYPES, "float64")


def parser() -> argparse.ArgumentParser:
    """Returns what reads the command line."""
    top = argparse.ArgumentParser(prog="opt8bit", description="8-bit optimizer states; compressed, corrected weights.")
    top.add_argument("--version", action="version", version=f"opt8bit {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print version, processor and which backend serves each device")
    _add_demo(commands)
    _add_memory(commands)
    _add_compress(commands)
    _add_correct(commands)
    check = commands.add_parser("verify", help="load a written checkpoint, and compare it with what was made")
    check.add_argument("folder", metavar="DIR", help="that opt8bit compress or correct has written")
    check.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    look = commands.add_parser("inspect", help="print what is inside a checkpoint")
    look.add_argument("folder", type=Path, metavar="DIR", help="with a config.json and weights in safetensors")
    _add_report(commands)
    _add_evaluate(commands)
    _add_run(commands)
    return top


def _add_demo(commands: argparse._SubParsersAction) -> None:
    words = "train a small GPT twice, with torch.optim.AdamW and with opt8bit.AdamW8bit, and compare"
    add = commands.add_parser("demo", help=words, formatter_class=HelpFormatter).add_argument
    add("--text", type=Path, help="file to train on (default: Python's standard library)")
    add("--steps", type=at_least(2), default=DemoSettings.steps, help="training steps of each run")
    add("--seed", type=number(options_of(RunOptions)["seed"]), default=DemoSettings.seed, help="of weights and batches")
    add("--plot", type=Path, default=Path("opt8bit-demo.png"), help="where to save the loss curves")


def _add_memory(commands: argparse._SubParsersAction) -> None:
    words = "print what a model's weights, gradients and optimizer states take, at 32 and at 8 bits"
    add = commands.add_parser("memory", help=words, formatter_class=HelpFormatter).add_argument
    add("model", metavar="MODEL", help="folder with a config.json, or id of a model on the hub")
    add("--dtype", choices=MEMORY_DTYPES, default="config", help="of the parameters")
    add("--block-size", type=int, help="elements per block of an 8-bit state (default: the optimizers' own)")
    add("--min-8bit-size", type=int, help="smaller tensors keep their states in full (default: the optimizers' own)")
    add("--ranks", type=at_least(1), default=1, help="processes that share the parameters, as FSDP2 does")


def _add_compress(commands: argparse._SubParsersAction) -> None:
    words = "round a trained language model's weights to 2-8 bits, and write it"
    command = commands.add_parser("compress", help=words, formatter_class=HelpFormatter)
    add = command.add_argument
    add("model", metavar="MODEL", help="folder with a checkpoint in safetensors, or id of a model on the hub")
    add("--calibration", required=True, metavar="TEXT", help=f"like what the model is for: {TEXTS}")
    add("--text-column", metavar="NAME", help=COLUMN)
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    add_flags(command, Recipe)
    add_flags(command, RunOptions)
    add_old_flags(command, RENAMED)
    add("--recipe", type=Path, metavar="FILE", help="options in JSON, and others for single layers; flags go first")
    add("--resume", action="store_true", help="go on with a run that ended before it was done")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="load the result back and compare")
    add("--trust-remote-code", action="store_true", help=TRUST)


def _add_correct(commands: argparse._SubParsersAction) -> None:
    words = "add biases that correct a quantized checkpoint, whoever has made it, and change nothing else"
    command = commands.add_parser("correct", help=words, formatter_class=HelpFormatter)
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


def _add_report(commands: argparse._SubParsersAction) -> None:
    words = "write one HTML page on a compressed model: bits, size, errors, quality, recipe, how to serve it"
    add = commands.add_parser("report", help=words, formatter_class=HelpFormatter).add_argument
    add("folder", type=Path, metavar="DIR", help="that opt8bit compress has written")
    add("--output", type=Path, default=Path("report.html"), metavar="FILE", help="to write; it must not exist")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    words = "print the perplexity of a language model on a text"
    add = commands.add_parser("evaluate", help=words, formatter_class=HelpFormatter).add_argument
    add("model", metavar="MODEL", help="folder with a checkpoint in safetensors, or id of the hub")
    add("--text", required=True, metavar="TEXT", help=f"to predict: {TEXTS}")
    add("--text-column", metavar="NAME", help=COLUMN)
    add("--sequence-length", type=at_least(1), default=512, help="tokens of a window; windows do not overlap")
    add("--samples", type=at_least(1), default=20, help="windows, from the start of the text")
    add("--bos", action="store_true", help=BOS)
    add("--json", action="store_true", help="print one line of JSON")
    add("--trust-remote-code", action="store_true", help=TRUST)


def _add_run(commands: argparse._SubParsersAction) -> None:
    words = "run a script or a module with opt8bit's optimizers in place of bitsandbytes'"
    usage = "opt8bit run SCRIPT [ARGUMENT ...]\n       opt8bit run -m MODULE [ARGUMENT ...]"
    command = commands.add_parser("run", help=words, usage=usage, epilog="ARGUMENTs are those of the script or module.")
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("-m", dest="module", metavar="MODULE", help="name of a module, run as python -m does")
    target.add_argument("script", metavar="SCRIPT", nargs="?", help="file, or folder or zip file with a __main__.py")


def split_run(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments of opt8bit, and those of what ``opt8bit run`` runs, which are handed on as they are."""
    own = len(arguments)
    if arguments[:1] == ["run"]:
        own = 3 if arguments[1:2] == ["-m"] else 2
    return arguments[:own], arguments[own:]


def run_info(options: argparse.Namespace) -> None:
    from opt8bit.cli import info

    print(info.report())


def run_demo(options: argparse.Namespace) -> None:
    from opt8bit.cli import demo

    demo.run(DemoSettings(steps=options.steps, seed=options.seed), options.text, options.plot)


def run_memory(options: argparse.Namespace) -> None:
    from opt8bit.cli import memory

    print(memory.report(options.model, options.dtype, options.block_size, options.min_8bit_size, options.ranks))


def run_compress(options: argparse.Namespace) -> None:
    values = {} if options.recipe is None else read_recipe(options.recipe)
    names = {*options_of(Recipe), *options_of(RunOptions), *RENAMED}
    try:
        flags = renamed(given(options, names))
    except ValueError as error:
        raise CommandError(str(error)) from error
    recipe, run = options_from({**values, **flags})
    from opt8bit.cli import compress

    compress.run(
        compress.Settings(
            model=options.model,
            calibration=options.calibration,
            text_column=options.text_column,
            output=options.output,
            recipe=recipe,
            run=run,
            resume=options.resume,
            verify=options.verify,
            trust_remote_code=options.trust_remote_code,
        )
    )


def run_correct(options: argparse.Namespace) -> None:
    from opt8bit.cli import correct, correct_onnx

    command = correct_onnx if options.checkpoint.endswith(".onnx") else correct
    command.run(
        correct.Settings(
            checkpoint=options.checkpoint,
            reference=options.reference,
            calibration=options.calibration,
            text_column=options.text_column,
            tokenizer=options.tokenizer,
            output=options.output,
            how=CorrectionOptions(**given(options, options_of(CorrectionOptions))),
            text=RunOptions(**given(options, TEXT_OPTIONS)),
            again=options.again,
            verify=options.verify,
            trust_remote_code=options.trust_remote_code,
        )
    )


def run_verify(options: argparse.Namespace) -> None:
    from opt8bit.cli import verify

    verify.run(options.folder, options.trust_remote_code)


def run_inspect(options: argparse.Namespace) -> None:
    from opt8bit.cli import inspect

    print(inspect.report(options.folder))


def run_report(options: argparse.Namespace) -> None:
    from opt8bit.cli import report

    report.run(options.folder, options.output)


def run_evaluate(options: argparse.Namespace) -> None:
    from opt8bit.cli import evaluate
    from opt8bit.cli.texts import find_text

    length, samples = options.sequence_length, options.samples
    text = find_text(options.text, options.text_column)
    about = {"bos": options.bos, "as_json": options.json, "trust_remote_code": options.trust_remote_code}
    print(evaluate.report(options.model, text, length, samples, **about))


def run_run(options: argparse.Namespace) -> None:
    from opt8bit.cli import run

    run.run(options.module or options.script, options.arguments, options.module is not None)


COMMANDS = {
    "info": run_info,
    "demo": run_demo,
    "memory": run_memory,
    "compress": run_compress,
    "correct": run_correct,
    "evaluate": run_evaluate,
    "verify": run_verify,
    "inspect": run_inspect,
    "report": run_report,
    "run": run_run,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    own, handed_on = split_run(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(own, argparse.Namespace(arguments=handed_on))
    try:
        COMMANDS[options.command](options)
    except CommandError as error:
        print(f"opt8bit {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"opt8bit {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0
