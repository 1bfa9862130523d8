"""The examples are short and listed, CI runs the scripts, and the notebook's cells run and are shown as they ran."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LONGEST, LARGEST = 60, 100_000  # lines of a script, bytes of a notebook


def cells() -> list[dict[str, Any]]:
    return json.loads((EXAMPLES / "state_error.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_say_how_to_run_them_and_how_long_they_take(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= LONGEST
    docstring = text.split('"""')[1]
    assert f"    python examples/{script.name}\n" in docstring
    assert re.search(r"^Takes .*(seconds|minutes)", docstring, re.MULTILINE)


def test_all_are_listed_and_all_scripts_are_run_by_ci() -> None:
    listed = re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.name != "README.md")
    (loop,) = re.findall(r"for example in (.*); do", (ROOT / ".ci" / "run").read_text())
    assert sorted(loop.split()) == [script.stem for script in SCRIPTS]


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot: Any = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)  # which has nowhere to show it
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells():
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec", dont_inherit=True), names)
            names |= {name: value for name, value in {"STEPS": 20}.items() if name in names}
    assert names["steps"] == [10, 20] and names["losses"][1] < names["losses"][0]
    for errors in (*names["of_one_step"], *names["since_the_first"]):
        assert errors.keys() == {"exp_avg", "exp_avg_sq"} and all(0 < error < 0.1 for error in errors.values())
    of_state = [errors["exp_avg"] for errors in (names["of_one_step"][1], names["since_the_first"][1])]
    assert of_state[0] < of_state[1]  # which has those of all steps
    drawn = {line.get_label() for line in names["left"].get_lines()}
    assert "exp_avg, one step" in drawn and len(drawn) == 4
    pyplot.close("all")


def test_the_notebook_is_shown_with_what_it_printed() -> None:
    assert (EXAMPLES / "state_error.ipynb").stat().st_size < LARGEST
    outputs = [output for cell in cells() for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert [output for output in outputs if "mean levels" in "".join(output.get("text", ""))]
