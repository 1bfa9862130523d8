"""The design, held by tests: imports point down and make no circles, files and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import opt8bit

PACKAGE = Path(opt8bit.__file__).parent
KERNELS, CPP = Path(__file__).parents[1] / "kernels", (".h", ".cpp")
LAYERS = {  # each may import itself and what it names
    "cli": {"integrations", "ptq", "recipe", "optim", "nn", "quant", "backends"},
    "integrations": {"optim"},
    "ptq": {"recipe", "quant", "backends"},
    "optim": {"quant", "backends"},
    "nn": {"quant", "backends"},
    "quant": {"backends"},
    "backends": set(),
    "recipe": set(),
    "warning": set(),
}
TRAINS = ("opt8bit.ptq.reconstruction", "opt8bit.ptq.refinement")  # by the library's own optimizers
# Files and folders of opt8bit/ptq: each may import its own and those of the lines above.
ORDER = (
    {"ranks", "naming", "verification"},
    {"calibration"},
    {"rounding"},
    {"model"},
    {"compressed", "evaluate", "group_sizes", "loss_gradients", "schemes", "stage_inputs"},
    {"transforms", "reconstruction", "activations"},
    {"correction", "plan", "tasks"},
    {"layer_report", "need", "pairs", "stage"},
    {"result", "routed", "allocation"},
    {"outside", "progress", "report", "resume"},
    {"block", "export", "token_weights"},
    {"inspect", "pipeline", "refinement"},
    {"compress", "correct", "verify"},
    {"corrected_checkpoint", "corrected_onnx"},
    {"conversion"},
    {"__init__"},
)
LONGEST_FILE, LONGEST_FUNCTION = 300, 50  # lines; of a function those beneath its docstring


def module_name(path: Path) -> str:
    parts = ("opt8bit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """The modules of opt8bit that a file imports, those for types alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
            if (node.module or "").split(".")[0] == "opt8bit":
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}"
                    yield inside if inside in MODULES else f"{node.module}"


def place(module: str, depth: int) -> str:
    """The file or folder of a module at a depth of the package."""
    parts = module.split(".")
    return parts[depth] if len(parts) > depth else "__init__"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    modules = [name for name in MODULES if place(name, 1) == layer]
    assert modules
    for name in modules:
        found = {place(other, 1) for other in imports(MODULES[name])} - {"__init__"}
        allowed = LAYERS[layer] | {layer, "warning"} | ({"optim"} if name.startswith(TRAINS) else set())
        assert found <= allowed, name


def test_imports_point_down_inside_the_compress_half() -> None:
    ranks = {name: rank for rank, names in enumerate(ORDER) for name in names}
    for name in (name for name in MODULES if name.startswith("opt8bit.ptq")):
        own = place(name, 2)
        for other in imports(MODULES[name]):
            if other.startswith("opt8bit.ptq") and place(other, 2) != own:
                assert ranks[place(other, 2)] < ranks[own], f"{name} imports {other}"


def test_no_imports_make_a_circle() -> None:
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_folder_has_its_layer() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(LAYERS) - {"warning"}  # a file


def test_files_are_short() -> None:
    kernels = [path for path in KERNELS.rglob("*.*") if path.suffix in CPP]
    assert kernels
    for path in (*MODULES.values(), *kernels):
        assert len(path.read_text().splitlines()) <= LONGEST_FILE, path


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """The name of each function of a file, and how many lines it has beneath its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1 if has_docstring else 0]
            yield node.name, (node.end_lineno or 0) - first.lineno + 1


def test_functions_are_short() -> None:
    for path in MODULES.values():
        for name, lines in functions(path):
            assert lines <= LONGEST_FUNCTION, f"{path}: {name} has {lines}"


def test_only_the_command_prints() -> None:
    """The library warns, logs or raises."""
    for name, path in MODULES.items():
        if place(name, 1) != "cli":
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}, name


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_loads_no_kernels_and_starts_no_warnings() -> None:
    code = "import opt8bit.ptq, opt8bit.optim; from opt8bit.backends import native; "
    assert run(f"{code}print(native.library.cache_info().currsize)") == "0\n"


def test_importing_takes_only_the_dependencies() -> None:
    code = (
        "import sys, torch; torchs = set(sys.modules); import opt8bit.ptq, opt8bit.optim, opt8bit.cli.compress; "
        "print({'matplotlib', 'tqdm', 'transformers', 'onnx', 'onnxruntime'} & (set(sys.modules) - torchs))"
    )
    assert run(code) == "set()\n"


@pytest.mark.parametrize("module", ["opt8bit", "opt8bit.recipe", "opt8bit.cli.main"])
def test_recipes_and_the_commands_help_need_no_torch(module: str) -> None:
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False\n"


def test_optimizers_load_nothing_that_they_do_not_need() -> None:
    code = (
        "import sys, torch; torchs = set(sys.modules); import opt8bit; opt8bit.AdamW8bit; "
        "print({'opt8bit.ptq', 'torch.distributed.nn', 'torch.distributed.tensor'} & (set(sys.modules) - torchs))"
    )
    assert run(code) == "set()\n"


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_what_the_package_offers_is_there() -> None:
    assert run("import opt8bit; print({getattr(opt8bit, name) is None for name in opt8bit.__all__})") == "{False}\n"
    assert run("import opt8bit; print(set(opt8bit.__all__) <= set(dir(opt8bit)))") == "True\n"
    with pytest.raises(AttributeError, match="module 'opt8bit' has no attribute 'Adam'"):
        opt8bit.Adam  # type: ignore[attr-defined]  # noqa: B018
