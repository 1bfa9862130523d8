"""docs/how-a-step-works.md quotes lines that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-a-step-works.md").read_text()


def source(name: str) -> str:
    found = [path for path in (ROOT / name, ROOT / "opt8bit" / name) if path.exists()]
    assert found, name
    return found[0].read_text()


def check_lines(name: str, lines: str) -> None:
    for line in re.findall("`(.+?)`", lines):
        assert line in source(name), f"{name}: {line}"


def test_every_place_has_its_lines() -> None:
    places = re.findall(r"^\| \d \| \[`(.+?)`\]\((.+?)\) \| (.+?) \|", PAGE, re.MULTILINE)
    assert len(places) == 5
    for name, link, lines in places:
        assert (ROOT / "docs" / link).resolve() == (ROOT / ("" if name.startswith("kernels") else "opt8bit") / name)
        check_lines(name, lines)


def test_what_is_to_be_looked_for_is_there() -> None:
    cited = re.findall(r"`((?:kernels|backends|optim)/[\w/]+\.(?:h|cpp|py))`((?:: `[^`]+`(?:, `[^`]+`)*)?)", PAGE)
    assert len(cited) > 20
    for name, lines in cited:
        check_lines(name, lines)
