"""The ``opt8bit`` command. Each command is imported when it runs, so that the help needs no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from opt8bit.cli.completion import script
from opt8bit.cli.demo_settings import DemoSettings
from opt8bit.cli.errors import CommandError
from opt8bit.cli.flags import given
from opt8bit.cli.parser import parser
from opt8bit.cli.recipes import options_from, read_recipe
from opt8bit.cli.run_options import LENGTH, TEXT_OPTIONS, WINDOWS, CorrectionOptions, RunOptions
from opt8bit.recipe import Recipe
from opt8bit.recipe.names import RENAMED, renamed
from opt8bit.recipe.options import options_of


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


def run_convert(options: argparse.Namespace) -> None:
    from opt8bit.cli import convert

    about = {"round_again": options.round_again, "trust_remote_code": options.trust_remote_code}
    convert.run(options.model, options.output, options.format, **about)


def run_verify(options: argparse.Namespace) -> None:
    from opt8bit.cli import verify

    verify.run(options.folder, options.trust_remote_code)


def run_inspect(options: argparse.Namespace) -> None:
    from opt8bit.cli import inspect

    print(inspect.report(options.folder))


def run_report(options: argparse.Namespace) -> None:
    from opt8bit.cli import report

    report.run(options.folder, options.output)


def _refuse(options: argparse.Namespace, names: Sequence[str], owner: str) -> None:
    """
    Raises:
        CommandError: options are given that are for another one.
    """
    for name in names:
        if getattr(options, name) not in (None, False):
            raise CommandError(f"--{name.replace('_', '-')} is for {owner}")


def run_tasks(options: argparse.Namespace) -> None:
    _refuse(options, ("text_column", "sequence_length", "samples", "bos"), "--text")
    from opt8bit.cli import tasks

    about = {"task_folder": options.task_folder, "limit": options.limit, "as_json": options.json}
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    print(tasks.report(options.model, names, **about, trust_remote_code=options.trust_remote_code))


def run_evaluate(options: argparse.Namespace) -> None:
    if options.tasks is not None:
        run_tasks(options)
        return
    _refuse(options, ("task_folder", "limit"), "--tasks")
    from opt8bit.cli import evaluate
    from opt8bit.cli.texts import find_text

    length, samples = options.sequence_length or LENGTH, options.samples or WINDOWS
    text = find_text(options.text, options.text_column)
    about = {"bos": options.bos, "as_json": options.json, "trust_remote_code": options.trust_remote_code}
    print(evaluate.report(options.model, text, length, samples, **about))


def run_run(options: argparse.Namespace) -> None:
    from opt8bit.cli import run

    run.run(options.module or options.script, options.arguments, options.module is not None)


def run_completion(options: argparse.Namespace) -> None:
    print(script(parser(), options.shell), end="")


COMMANDS = {
    "info": run_info,
    "demo": run_demo,
    "memory": run_memory,
    "compress": run_compress,
    "correct": run_correct,
    "convert": run_convert,
    "evaluate": run_evaluate,
    "verify": run_verify,
    "inspect": run_inspect,
    "report": run_report,
    "run": run_run,
    "completion": run_completion,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, or prints the help if there is none; returns the exit status."""
    own, handed_on = split_run(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(own or ["--help"], argparse.Namespace(arguments=handed_on))
    try:
        COMMANDS[options.command](options)
    except CommandError as error:
        print(f"opt8bit {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"opt8bit {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0
