"""Where texts are looked for: files, folders and data sets, and what must be installed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from some_texts import JOINED, ROWS, TEXTS, json_lines, read

from opt8bit.cli.errors import CommandError
from opt8bit.cli.texts import find_text


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    names = ["a/z.txt", "a.md", *(f"b{i}.txt" for i in range(10, 30))]
    for name in (*names[::-2], *names[::2], *names[1::2], ".hidden/x.txt", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == "\n\n".join(names)
    (tmp_path / "rows.jsonl").write_bytes(json_lines(ROWS))
    with pytest.raises(CommandError, match=r"z\.txt is a text and .*rows\.jsonl has records: give one of them"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("place", "module", "message"),
    [
        ("rows.parquet", "pyarrow.parquet", "rows.parquet: to read Parquet, pip install pyarrow"),
        ("text.zst", "zstandard", "text.zst: to read .zst, pip install zstandard, or use Python 3.14"),
        ("owner/name", "datasets", "there is no file 'owner/name'; to look for a data set of that name, pip install"),
    ],
)
def test_what_must_be_installed_is_said(
    place: str, module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "/" not in place:
        (tmp_path / place).write_bytes(b"\x28\xb5\x2f\xfd")
    for name in (module, "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CommandError) as error:
        read(place)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:config", ("owner/name", "config", "train")),
        ("owner/name:config:test", ("owner/name", "config", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_names_of_data_sets(
    name: str, asked: tuple[str, str | None, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert streaming and (path, config, split) == asked
        return ROWS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert read(name) == JOINED
    with pytest.raises(
        CommandError, match=f"data set owner/name:.*:{asked[2]}, row 1: no column 'body', it has id, text"
    ):
        read(name, "body")
    if ":" not in name:  # what is on the disk goes first
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("a")
        assert read(name) == "a"
        (tmp_path / name / "a.txt").rename(tmp_path / "a.txt")
        (tmp_path / name).rmdir()
        (tmp_path / "a.txt").rename(tmp_path / name)
        assert read(name) == "a"


def test_the_datasets_package_reads_what_we_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from opt8bit.cli.texts.hub import DataSet

    (tmp_path / "rows.jsonl").write_bytes(json_lines(ROWS))
    assert [row["text"] for _, row in DataSet(str(tmp_path)).records()] == TEXTS
    with pytest.raises(CommandError, match="row 1: cannot load it: "):
        list(DataSet(str(tmp_path), split="other").records())


@pytest.mark.parametrize("place", ["missing.txt", "owner/missing.jsonl", "a/b/c", "missing"])
def test_what_is_missing_is_a_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=f"cannot read '{place}': there is no such file or folder"):
        find_text(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match="'empty' has no files"):
        find_text("empty")
