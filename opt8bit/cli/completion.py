"""``opt8bit completion``: a script for a shell, made from what the command's parser accepts. Needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

from opt8bit.cli.overview import COMMANDS


class Flag(NamedTuple):
    """One option of a command."""

    names: list[str]  # with their dashes
    help: str
    has_value: bool
    choices: list[str]  # of its value; empty if that may be anything, such as a file


class Command(NamedTuple):
    """Lists what may follow the name of a command."""

    flags: list[Flag]
    words: list[str]  # that its first argument is one of; empty if that may be anything


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the script by which a shell completes a command.

    Args:
        parser: of the command, with subcommands.
        shell: one of :data:`SHELLS`.
    """
    (subcommands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    commands = {name: _command(command) for name, command in subcommands.choices.items()}
    return SHELLS[shell](_command(parser).flags, commands)


def _command(parser: argparse.ArgumentParser) -> Command:
    # argparse has no public list of what a parser accepts.
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    flags = [
        Flag(list(action.option_strings), action.help or "", action.nargs != 0, _words(action.choices))
        for action in shown
        if action.option_strings
    ]
    words = [word for action in shown if not action.option_strings for word in _words(action.choices)]
    return Command(flags, words)


def _words(choices: object) -> list[str]:
    return [str(choice) for choice in choices] if isinstance(choices, list | tuple | dict) else []


def _cases(flags: list[Flag], commands: dict[str, Command]) -> Iterator[str]:
    """Yields the branches that bash and zsh have in common.

    They read ``command``, which is empty where it is about to be completed, and ``previous``, the word before the
    cursor; and set ``found``, the words to choose from, and ``flags``, those if the word begins with a dash.
    """
    names = [name for flag in flags for name in flag.names]
    yield f"    ' '*) found='{' '.join(commands)}' flags='{' '.join(names)}' ;;"
    for name, command in commands.items():
        for flag in command.flags:
            if flag.has_value:
                pattern = "|".join(f"'{name} {each}'" for each in flag.names)
                yield f"    {pattern}) found='{' '.join(flag.choices)}' ;;"
        names = [each for flag in command.flags for each in flag.names]
        yield f"    '{name} '*) found='{' '.join(command.words)}' flags='{' '.join(names)}' ;;"


BASH = """\
# Completes opt8bit in bash: eval "$(opt8bit completion bash)"
_opt8bit() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}" command= found= flags=
  ((COMP_CWORD > 1)) && command="${{COMP_WORDS[1]}}"
  case "$command $previous" in
{cases}
  esac
  [[ $current == -* ]] && found=$flags
  COMPREPLY=($(compgen -W "$found" -- "$current"))
}}
complete -o bashdefault -o default -F _opt8bit opt8bit
"""

ZSH = """\
#compdef opt8bit
# Completes opt8bit in zsh, behind compinit: eval "$(opt8bit completion zsh)"
_opt8bit() {{
  local current=$words[CURRENT] previous=$words[CURRENT-1] command= found= flags=
  ((CURRENT > 2)) && command=$words[2]
  case "$command $previous" in
{cases}
  esac
  [[ $current == -* ]] && found=$flags
  if [[ -n $found ]]; then
    compadd -- ${{=found}}
  else
    _files
  fi
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _opt8bit "$@"
else
  compdef _opt8bit opt8bit
fi
"""


def _bash(flags: list[Flag], commands: dict[str, Command]) -> str:
    return BASH.format(cases="\n".join(_cases(flags, commands)))


def _zsh(flags: list[Flag], commands: dict[str, Command]) -> str:
    return ZSH.format(cases="\n".join(_cases(flags, commands)))


def _fish(flags: list[Flag], commands: dict[str, Command]) -> str:
    lines = ["# Completes opt8bit in fish: opt8bit completion fish | source"]
    lines += [_fish_flag("__fish_use_subcommand", flag) for flag in flags]
    for name, command in commands.items():
        lines.append(f"complete -c opt8bit -f -n __fish_use_subcommand -a {name} -d {_quoted(COMMANDS[name])}")
        condition = _quoted(f"__fish_seen_subcommand_from {name}")
        if command.words:
            lines.append(f"complete -c opt8bit -f -n {condition} -a {_quoted(' '.join(command.words))}")
        lines += [_fish_flag(condition, flag) for flag in command.flags]
    return "\n".join(lines) + "\n"


def _fish_flag(condition: str, flag: Flag) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
    value = [f"-x -a {_quoted(' '.join(flag.choices))}"] if flag.choices else ["-r"] if flag.has_value else []
    return " ".join(["complete -c opt8bit -n", condition, *names, *value, "-d", _quoted(flag.help)])


def _quoted(text: str) -> str:
    """Returns a text as one word of fish's."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SHELLS: dict[str, Callable[[list[Flag], dict[str, Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
