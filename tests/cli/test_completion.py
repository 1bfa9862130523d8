"""Scripts of ``opt8bit completion``, asked by the shells themselves what they would offer."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from opt8bit.cli.completion import SHELLS
from opt8bit.cli.main import COMMANDS, main
from opt8bit.recipe import Recipe
from opt8bit.recipe.options import options_of
from opt8bit.recipe.registry import ROUNDERS

Offers = Callable[..., list[str]]
IN_BASH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last}
_opt8bit opt8bit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
IN_FISH = "source {script}; complete -C {line}"


@pytest.fixture(params=["bash", "fish"])
def offers(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Offers:
    """Returns what a shell offers for the last one of some words."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    script = shlex.quote(str(tmp_path / "script"))

    def ask(*words: str) -> list[str]:
        if shell == "bash":
            line = " ".join(map(shlex.quote, words))
            code = IN_BASH.format(script=script, words=line, last=len(words) - 1)
        else:
            code = IN_FISH.format(script=script, line=shlex.quote(" ".join(words)))
        done = subprocess.run([shell, "-c", code], capture_output=True, text=True, check=True)
        assert not done.stderr
        return [line.partition("\t")[0] for line in done.stdout.splitlines() if line]

    return ask


def test_commands_are_offered(offers: Offers) -> None:
    assert sorted(offers("opt8bit", "")) == sorted(COMMANDS)
    assert sorted(offers("opt8bit", "co")) == ["completion", "compress", "convert", "correct"]
    assert "--version" in offers("opt8bit", "--")


def test_every_option_of_a_recipe_is_offered(offers: Offers) -> None:
    found = offers("opt8bit", "compress", "model", "--")
    flags = {f"--{option.flag or name.replace('_', '-')}" for name, option in options_of(Recipe).items()}
    assert flags | {"--no-polish", "--symmetric-restricted", "--for", "--help"} <= set(found)
    assert "--correct" not in found  # the name that an option had
    assert offers("opt8bit", "compress", "model", "--gro") == ["--group-size"]
    assert "--group-size" not in offers("opt8bit", "evaluate", "model", "--")


def test_the_words_that_an_option_can_be_are_offered(offers: Offers) -> None:
    assert sorted(offers("opt8bit", "compress", "--method", "")) == sorted(ROUNDERS)
    assert offers("opt8bit", "compress", "--method", "qu") == ["quantease"]
    assert sorted(offers("opt8bit", "completion", "")) == sorted(SHELLS)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("opt8bit comple\tbas\t", "completion bash"),
        ("opt8bit compress model --meth\tquant\t", "compress model --method quantease"),
        ("opt8bit compress --output fold\t", "compress --output folder/"),  # by readline: any file
    ],
)
def test_the_tab_key_completes_in_bash(
    typed: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pty = pytest.importorskip("pty")
    main(["completion", "bash"])
    says_its_words = 'opt8bit() { printf "<%s>" "$*"; }\n'
    (tmp_path / "rc").write_text(f"{capsys.readouterr().out}{says_its_words}bind 'set enable-bracketed-paste off'\n")
    (tmp_path / "folder").mkdir()
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--rcfile", "rc", "-i"], stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, start_new_session=True
    )
    os.write(master, f"{typed}\nexit\n".encode())
    os.close(slave)
    shown = b""
    with suppress(OSError):  # which says that the shell has ended
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    assert shell.wait() == 0
    assert f"<{expected}>" in shown.decode()


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_in_the_shells_language(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    main(["completion", shell])
    done = subprocess.run([shell, "-n"], input=capsys.readouterr().out, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
