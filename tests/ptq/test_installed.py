"""What is said before a run of packed weights that the installed packages do not load."""

import re

import pytest
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.export import installed
from opt8bit.ptq.export.installed import Codes, not_loaded_here

ODD = "cannot load 3 bits, from compressed-tensors 0.18 on it can"
WHOLE = "cannot load 3 bits packed so, up to compressed-tensors 0.17 it can"
ASYMMETRIC = "cannot load grids that are not symmetric, transformers 5 can"


def have(monkeypatch: pytest.MonkeyPatch, transformers: str, package: str) -> None:
    versions = {"transformers": transformers, "compressed-tensors": package}
    monkeypatch.setattr(installed, "version", versions.__getitem__)


@pytest.mark.parametrize(
    ("transformers", "package", "codes", "messages"),
    [
        ("5.24.0", "0.20.1", (3, False, False), []),
        ("5.24.0", "0.17.1", (3, True, False), [ODD]),
        ("5.24.0", "0.17.1", (4, True, False), []),
        ("4.57.6", "0.17.1", (4, False, False), []),
        ("4.57.6", "0.18.0", (4, False, False), [ASYMMETRIC]),
        ("4.57.6", "0.18.0", (4, True, False), []),
        ("4.57.6", "0.17.1", (3, False, False), [ODD]),
        ("5.24.0", "0.17.1", (3, False, True), []),
        ("5.24.0", "0.20.1", (3, True, True), [WHOLE]),
        ("4.57.6", "0.18.0", (3, False, True), [WHOLE, ASYMMETRIC]),
    ],
)
def test_packages_load_what_they_have_been_seen_to_load(
    transformers: str, package: str, codes: tuple[int, bool, bool], messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, transformers, package)
    found = not_loaded_here([Codes(*codes)])
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert message in line and line.startswith(f"transformers {transformers} with compressed-tensors {package}")


def test_nothing_is_said_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    assert not not_loaded_here([Codes(3, False)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    have(monkeypatch, "5.24.0", "0.17.1")
    said: list[int] = []
    with pytest.warns(UserWarning, match=re.escape(ODD)) as caught:
        ptq.compress(
            MODELS["llama"](),
            token_ids(),
            bits=3,
            group_size=16,
            checkpoint_format="compressed-tensors",
            see=lambda report, count: said.append(len(caught)),
        )
    assert said and said[0]
