"""install() and uninstall(), with bitsandbytes and without it, and the command that runs a script under them."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from opt8bit.cli.main import main
from opt8bit.integrations.bitsandbytes import installing

BEFORE = "from opt8bit.integrations.bitsandbytes import install, uninstall; import sys, importlib.util"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with a package that passes for bitsandbytes, of an older version that lacks some optimizers."""
    package = tmp_path / "theirs" / "bitsandbytes"
    (package / "optim").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.44'\nfrom bitsandbytes import nn, optim\n")
    (package / "nn.py").write_text("class Linear8bitLt: ...\n")
    (package / "optim" / "__init__.py").write_text("class AdamW8bit: ...\nclass PytorchLARS: ...\n")
    return package.parent


# Hides bitsandbytes, if it is installed.
HIDE = """
import sys
from importlib.machinery import PathFinder
class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "bitsandbytes" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
"""


def run(code: str) -> str:
    """What a fresh Python prints."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_without_bitsandbytes() -> None:
    code = f"{HIDE}{BEFORE}\n" + (
        "install(); install(); import bitsandbytes as bnb, bitsandbytes.optim\n"
        "from bitsandbytes.optim import AdamW8bit, GlobalOptimManager\n"
        "from opt8bit.integrations.bitsandbytes import optim\n"
        "assert bnb.optim.AdamW8bit is AdamW8bit is optim.AdamW8bit\n"
        "assert importlib.util.find_spec('bitsandbytes').name == 'bitsandbytes' and bnb.__version__ >= '0.46.1'\n"
        "assert not hasattr(bnb.nn, 'Params4bit') and not isinstance(3, bnb.nn.Linear8bitLt)\n"
        "others = 'bnb.functional', 'bnb.nn.Params4bit', 'bnb.nn.Linear4bit(4, 4)', '__import__(\"bitsandbytes.x\")'\n"
        "for what in others:\n"
        "    try: eval(what)\n"
        "    except (AttributeError, ImportError) as error: print(type(error).__name__, error)\n"
        "uninstall(); uninstall()\n"
        "assert importlib.util.find_spec('bitsandbytes') is None\n"
        "assert not [name for name in sys.modules if name.startswith('bitsandbytes')]\n"
        "install(); assert __import__('bitsandbytes').optim is optim"
    )
    lines = run(code).splitlines()
    errors = ["AttributeError", "AttributeError", "ImportError", "ModuleNotFoundError"]
    assert [line.split()[0] for line in lines] == errors
    assert all("install bitsandbytes for" in line for line in lines[:3])


def test_with_bitsandbytes(theirs: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(theirs)!r})\n{BEFORE}\n" + (
        "import bitsandbytes as bnb; from bitsandbytes import optim as before\n"
        "old = bnb.optim.AdamW8bit; made = old()\n"
        "install(); install()\n"
        "from opt8bit.integrations.bitsandbytes import optim\n"
        "from bitsandbytes.optim import AdamW8bit\n"
        "assert AdamW8bit is optim.AdamW8bit is before.AdamW8bit and bnb.optim is before\n"
        "assert bnb.__version__ == '0.44' and bnb.optim.Lion is optim.Lion\n"
        "assert bnb.optim.PytorchLARS.__module__ == 'bitsandbytes.optim' == type(made).__module__\n"
        "assert bnb.nn.Linear8bitLt.__module__ == 'bitsandbytes.nn'\n"
        "uninstall()\n"
        "assert bnb.optim.AdamW8bit is old and not hasattr(bnb.optim, 'Lion')"
    )
    run(code)


@pytest.mark.parametrize("what", ["types.ModuleType('bitsandbytes')", "None"])
def test_what_others_have_put_there_is_put_back(what: str) -> None:
    code = f"{BEFORE}\n" + (
        f"import types; stub = sys.modules['bitsandbytes'] = {what}\n"
        "install()\n"
        "from opt8bit.integrations.bitsandbytes import optim\n"
        "from bitsandbytes.optim import AdamW8bit; assert AdamW8bit is optim.AdamW8bit\n"
        "uninstall()\n"
        "assert [name for name in sys.modules if name.startswith('bitsandbytes')] == ['bitsandbytes']\n"
        "assert sys.modules['bitsandbytes'] is stub"
    )
    run(code)


def test_importing_opt8bit_puts_nothing_anywhere() -> None:
    code = "import opt8bit, opt8bit.optim, opt8bit.integrations.bitsandbytes, sys; opt8bit.AdamW8bit; "
    assert run(f"{code}print([name for name in sys.modules if name.startswith('bitsandbytes')])") == "[]"


def test_the_example() -> None:
    assert doctest.testmod(installing).failed == 0


SCRIPT = (
    "import sys, helper, bitsandbytes\n"
    "if __name__ == '__main__': print(sys.argv[1:], helper.NAME, bitsandbytes.optim.AdamW8bit.__module__)\n"
)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", [["folder/script.py"], ["-m", "script"], ["-mscript"], ["folder"]])
def test_run(tmp_path: Path, how: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("script.py", "__main__.py"):
        (folder / name).write_text(SCRIPT)
    (folder / "helper.py").write_text("NAME = 'beside the script'\n")
    arguments = [sys.executable, "-m", "opt8bit", "run", *how, "--", "--steps", "3", "-m"]
    cwd = folder if how[0].startswith("-m") else tmp_path
    found = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=True).stdout
    assert found == "['--', '--steps', '3', '-m'] beside the script opt8bit.integrations.bitsandbytes.optim\n"


AS_PYTHON = """
import atexit, pickle, sys, threading, time

class Kept: ...

def dump(seconds=0):
    time.sleep(seconds)
    print(pickle.dumps(Kept()))

print(__file__, __spec__ and __spec__.name, sys.argv, sys.path[:2])
def annotated(kept: Kept): ...
print(annotated.__annotations__)
threading.Thread(target=dump, args=(0.1,)).start()
atexit.register(dump)
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", [["folder/script.py"], ["-m", "folder.script"], ["-m", "folder"], ["folder"]])
def test_a_script_finds_what_it_finds_under_python(tmp_path: Path, how: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("script.py", "__main__.py"):
        (folder / name).write_text(AS_PYTHON)
    commands = [[sys.executable, *how, "-x"], [sys.executable, "-m", "opt8bit", "run", *how, "-x"]]
    runs = [subprocess.run(each, cwd=tmp_path, capture_output=True, text=True, check=True) for each in commands]
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout.count("Kept") == 3
    assert runs[1].stderr == ""


def test_a_script_is_read_once() -> None:
    command = [sys.executable, "-m", "opt8bit", "run", "/dev/stdin"]
    if not Path(command[-1]).exists():
        pytest.skip("there is no /dev/stdin")
    assert subprocess.run(command, input="print(6 * 7)", capture_output=True, text=True, check=True).stdout == "42\n"


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_run_asks_for_what_it_is_to_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", *arguments])
    assert "-m SCRIPT is required" in (error := capsys.readouterr().err) or "-m: expected one argument" in error


@pytest.mark.slow
def test_run_says_what_is_not_there_and_shows_what_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opt8bit", "run"]
    found = subprocess.run([*command, "nothing.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stderr == "opt8bit run: no such script: nothing.py\n"
    found = subprocess.run([*command, "-m", "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and found.stderr == f"{sys.executable}: No module named nothing\n"
    (tmp_path / "fails.py").write_text("raise SystemExit(7)\n")
    assert subprocess.run([*command, "fails.py"], cwd=tmp_path, check=False).returncode == 7
