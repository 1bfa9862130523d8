"""Texts in every format that is read, and what is refused with its place."""

import bz2
import csv
import gzip
import importlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from some_texts import CHAT, JOINED, RENDERED, ROWS, SHARED, TEXTS, json_lines, read

from opt8bit.cli.errors import CommandError
from opt8bit.cli.main import main
from opt8bit.cli.texts.files import CHUNK


def table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])


def parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    pytest.importorskip("pyarrow")
    arrow = importlib.import_module("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text.txt": lambda path: path.write_text(JOINED, encoding="utf-8"),
    "text.md": lambda path: path.write_text(JOINED, encoding="utf-8-sig"),
    "text": lambda path: path.write_bytes(JOINED.replace("\n", "\r\n").encode()),
    "rows.jsonl": lambda path: path.write_bytes(json_lines(ROWS)),
    "rows.ndjson": lambda path: path.write_bytes(b"\n".join(json_lines(TEXTS).split(b"\n"))),
    "lines.json": lambda path: path.write_bytes(json_lines(ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "strings.json": lambda path: path.write_text(json.dumps(TEXTS)),
    "object.json": lambda path: path.write_text(json.dumps({"version": 1.5, "of": {"list": [1]}, "data": ROWS})),
    "record.json": lambda path: path.write_text(json.dumps({"id": 1, "text": JOINED, "tags": ["a"]}, indent=1)),
    "rows.csv": lambda path: table(path, ","),
    "rows.tsv": lambda path: table(path, "\t"),
    "rows.parquet": parquet,
    "text.txt.gz": lambda path: path.write_bytes(gzip.compress(JOINED.encode())),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(json_lines(ROWS))),
    "rows.JSON.XZ": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_has_the_same_text(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == JOINED


@pytest.mark.parametrize("name", [name for name in WRITERS if "parquet" not in name])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_chunks_may_end_anywhere(size: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt8bit.cli.texts.files.CHUNK", size)
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == JOINED


def test_zstandard_is_read_to_its_last_frame(tmp_path: Path) -> None:
    library = pytest.importorskip("zstandard")
    frames = [library.compress(text.encode()) for text in (JOINED, "", "more" * CHUNK)]
    (tmp_path / "text.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "text.zst") == JOINED + "more" * CHUNK
    (tmp_path / "text.zst").write_bytes(b"".join(frames)[:-3])
    with pytest.raises(CommandError, match=r"cannot read '.*text\.zst'"):
        read(tmp_path / "text.zst")


@pytest.mark.parametrize("suffix", ["", ".jsonl", ".json", ".csv"])
def test_what_is_longer_than_a_chunk_is_cut_nowhere(suffix: str, tmp_path: Path) -> None:
    rows = [f"{i} é\r\n" * (CHUNK // 2 + i) for i in range(7)]
    path = tmp_path / f"long{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(json_lines([{"text": row} for row in rows]))
    elif suffix == ".json":
        path.write_text(json.dumps({"data": [{"text": row} for row in rows]}, ensure_ascii=False), encoding="utf-8")
    elif suffix == ".csv":
        quoted = "".join(f'"{row}"\r\n' for row in ["text", *rows])
        path.write_bytes(quoted.encode())
    else:
        path.write_bytes("\n\n".join(rows).encode())
    expected = "\n\n".join(rows)  # in JSON a line's end is written out, and left as it is
    assert read(path) == (expected if "json" in suffix else expected.replace("\r\n", "\n"))


@pytest.mark.parametrize("rows", [[{"messages": CHAT}], [{"conversations": SHARED, "id": "a"}]], ids=["chat", "shared"])
@pytest.mark.parametrize("name", ["chat.jsonl", "chat.json", "record.json", "chat.parquet"])
def test_chats_are_rendered_by_the_models_template(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / name
    expected = RENDERED if name == "record.json" else f"{RENDERED}\n\n{RENDERED}"
    if name == "chat.parquet":
        parquet(path, rows * 2)
    elif name == "chat.jsonl":
        path.write_bytes(json_lines(rows * 2))
    else:
        path.write_text(json.dumps(rows[0] if name == "record.json" else rows * 2))
    assert read(path) == expected
    with pytest.raises(CommandError, match=f"{name}, .* 1.*: a chat, but the model's tokenizer has no chat template"):
        read(path, tokenizer=SimpleNamespace(chat_template=None))


def test_nulls_of_a_message_are_dropped_except_the_content(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(chat_template="there is one", apply_chat_template=lambda chat, tokenize: str(chat))
    message = {"role": "user", "content": None, "tool_calls": None}
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"messages": [message]}]))
    assert read(tmp_path / "a.jsonl", tokenizer=tokenizer) == "[{'role': 'user', 'content': None}]"


def test_what_a_template_refuses_is_said(tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("roles must alternate")

    (tmp_path / "a.jsonl").write_bytes(json_lines([{"messages": CHAT}]))
    with pytest.raises(CommandError, match=r"a\.jsonl, line 1: the model's chat template refuses it: roles must alter"):
        read(tmp_path / "a.jsonl", tokenizer=SimpleNamespace(chat_template="x", apply_chat_template=refuse))


def test_a_column_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"text": "a", "messages": CHAT, "body": "b"}]))
    assert [read(path, name) for name in ("text", "messages", "body")] == ["a", RENDERED, "b"]
    with pytest.raises(CommandError, match="line 1: text and messages are both there: say which by --text-column"):
        read(path)
    with pytest.raises(CommandError, match="line 1: no column 'words', it has text, messages, body"):
        read(path, "words")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(CommandError, match=r"--text-column text: .*a\.txt is a text and has no columns"):
        read(tmp_path / "a.txt", "text")


BROKEN: dict[str, tuple[str, bytes, str]] = {  # name of the file, what is in it, what is said
    "neither": (
        "a.jsonl",
        b'{"text": "a"}\n\n{"id": 1, "url": ""}',
        "a.jsonl, line 3: the columns are id, url; allowed is",
    ),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2: broken JSON: "),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl, line 1: a record must be an object with columns, got [1]"),
    "number": ("a.jsonl", b'{"text": 1}\n', "a.jsonl, line 1: the text must be a string or a chat, got 1"),
    "null": ("a.jsonl", b'{"text": null}\n', "a.jsonl, line 1: the columns are text; allowed is text (a string)"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: the text has half of a surrogate pair"),
    "message": ("a.jsonl", b'{"messages": ["hi"]}\n', "a.jsonl, line 1: a message has role and content, or from"),
    "role": ("a.jsonl", b'{"messages": [{"from": "me", "value": ""}]}\n', "line 1: a message is from one of system, "),
    "list": (
        "a.json",
        b'[{"text": "a"},\n {"text": "b"}\n {"text"',
        "a.json, line 3: broken JSON: '{' where one of ,]",
    ),
    "list's end": ("a.json", b'["a",\n"b"', "a.json, line 2: broken JSON: the end where one of ,] must be"),
    "value": ("a.json", b'["a",\n\n"b', "a.json, line 3: broken JSON: Unterminated string"),
    "more": ("a.json", b'["a"]\n["b"]', "a.json, line 2: broken JSON: more text after the list"),
    "element": ("a.json", b'["a",\n 1]', "a.json, line 2, record 2: a record must be an object with columns, got 1"),
    "far element": (
        "a.json",
        b'[\n"a\xc3\xa9' + b'",\n"' * CHUNK + b'",\n1]',
        f"a.json, line {CHUNK + 3}, record {CHUNK + 2}: a record must be",
    ),
    "two lists": (
        "a.json",
        b'{"train": ["a"], "test": ["b"]}',
        "must hold one list of records, it has the lists train, test",
    ),
    "no list": ("a.json", b'{"id": 1}', "must hold one list of records, it has no list, but id"),
    "scalar": ("a.json", b"\n1", "a.json, line 2: neither a list nor an object, but 1"),
    "header": ("a.csv", b"id,body\n1,a\n", "a.csv, line 2: the columns are id, body; allowed is text"),
    "fields": ("a.csv", b"id,text\n1,a\n2,b, c\n", "a.csv, line 3: 3 fields, where the first line names 2 columns"),
    "quote": ("a.tsv", b'id\ttext\n1\t"a\n', "a.tsv, line 2: unexpected end of data"),
    "bytes": ("a.txt", b"a" * CHUNK + b"\nb\n\xc3\x28", "a.txt, line 3: not UTF-8: byte 0xc3, invalid continuation"),
    "cut": ("a.txt", b"a\n\xc3", "a.txt, line 2: not UTF-8: byte 0xc3, unexpected end of data"),
    "zero": ("a.bin", b"a\n\0", "a.bin, line 2: a zero byte: it is no text"),
    "UTF-16": ("a.txt", "a".encode("utf-16"), "a.txt, line 1: a zero byte: it is UTF-16"),
    "disguised": ("a.txt", gzip.compress(b"a"), "a.txt, line 1: a zero byte: it is compressed by gzip: its name must"),
    "no gzip": ("a.txt.gz", b"a", "a.txt.gz': Not a gzipped file"),
    "half gzip": ("a.txt.gz", gzip.compress(b"a")[:-9], "a.txt.gz': Compressed file ended before"),
    "half xz": ("a.txt.xz", lzma.compress(b"a")[:-9], "a.txt.xz': Compressed file ended before"),
    **{f"empty{suffix}": (f"a{suffix}", b"", f"a{suffix} is empty") for suffix in (".txt", ".jsonl", ".json", ".csv")},
    "no records": ("a.json", b'{"data": []}', "a.json is empty"),
    "no rows": ("a.csv", b"id,text\n", "a.csv is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_what_is_broken_is_said_with_its_place(
    command: str, case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    output = ["--output", str(tmp_path / "out")] if command == "compress" else []
    option = "--calibration" if command == "compress" else "--text"
    assert main([command, str(folder / "llama"), option, str(tmp_path / name), *output]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(CommandError, match=r"a\.parquet, row 1: cannot read it: "):
        read(tmp_path / "a.parquet")
    parquet(tmp_path / "b.parquet", [{"id": 1, "body": "a"}])
    with pytest.raises(CommandError, match=r"b\.parquet, row 1: the columns are id, body; allowed is text"):
        read(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", "body") == "a"
