"""The arrows of the design: imports point down, and nothing happens on import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import opt8bit

PACKAGE = Path(opt8bit.__file__).parent
LAYERS = {  # each may import itself and what it names
    "cli": {"ptq", "optim", "nn", "quant", "backends"},
    "ptq": {"quant", "backends"},
    "optim": {"quant", "backends"},
    "nn": {"quant", "backends"},
    "quant": {"backends"},
    "backends": set(),
}


def imports(path: Path) -> set[str]:
    """The folders of opt8bit that a module imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("opt8bit.")}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    modules = list((PACKAGE / layer).rglob("*.py"))
    assert modules
    for path in modules:
        assert imports(path) <= LAYERS[layer] | {layer}, path


def test_every_folder_has_its_layer() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(LAYERS)


def test_importing_loads_no_kernels_and_starts_no_warnings() -> None:
    code = "import opt8bit; from opt8bit.backends import native; print(native.library.cache_info().currsize)"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "0\n"


def test_importing_takes_only_the_dependencies() -> None:
    code = (
        "import sys, torch; torchs = set(sys.modules); import opt8bit, opt8bit.cli.main; "
        "print({'rich', 'matplotlib', 'tqdm', 'transformers'} & (set(sys.modules) - torchs))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
