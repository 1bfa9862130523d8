"""The command's help, and what needs no torch."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from opt8bit.cli.main import COMMANDS, main
from opt8bit.cli.overview import FIRST_STEPS, GROUPS
from opt8bit.cli.parser import parser


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_help_lists_every_command_under_a_heading(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(COMMANDS)
    for heading, commands in GROUPS.items():
        assert f"\n{heading}:\n" in text
        for name, words in commands.items():
            assert f"\n  {name:<12}{words}\n" in text
    assert max(map(len, text.splitlines())) <= 80
    assert printed(capsys) == text  # without a command


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_is_for(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = next(group[command] for group in GROUPS.values() if command in group)
    text = printed(capsys, command, "--help")
    assert text.startswith(f"usage: opt8bit {command} ")
    assert " ".join(text.split()).count(f"{words[1:]}.") == 1


def test_the_first_steps_are_commands_that_there_are() -> None:
    for command in FIRST_STEPS:
        program, *arguments = command.split()
        assert program == "opt8bit" and isinstance(parser().parse_args(arguments), argparse.Namespace)


def loaded_by(arguments: list[str], module: str, folder: Path) -> bool:
    """Whether the command has loaded a module when it ends."""
    code = (
        "import atexit, sys; from opt8bit.cli.main import main; "
        f"atexit.register(lambda: print({module!r} in sys.modules, file=sys.stderr)); "
        f"main({arguments})"
    )
    # Elsewhere than here, where Python would find the sources before the package.
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout and done.stderr in ("False\n", "True\n")
    return done.stderr == "True\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compress", "--help"], ["completion", "bash"]], ids=" ".join
)
def test_what_only_prints_words_imports_no_torch(arguments: list[str], tmp_path: Path) -> None:
    assert not loaded_by(arguments, "torch", tmp_path)


def test_only_the_version_is_looked_up(tmp_path: Path) -> None:
    assert loaded_by(["--version"], "importlib.metadata", tmp_path)
    assert not loaded_by(["--help"], "importlib.metadata", tmp_path)
