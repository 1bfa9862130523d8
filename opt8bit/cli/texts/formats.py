"""Files that hold records: each format as a generator of records and of where they stand."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError
from opt8bit.cli.texts.files import COMPRESSED, lines
from opt8bit.cli.texts.json_values import JSONValues
from opt8bit.cli.texts.records import COLUMNS, is_message

Records = Iterator[tuple[str, Any]]  # where one stands, for messages; and a string, or an object of columns
ROWS = 256  # of a Parquet file that are read at once


def json_lines(path: Path, column: str | None = None) -> Records:
    """Yields the value of each line that is not blank, with all columns."""
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CommandError(f"{where}: broken JSON: {error}") from error
            yield where, value


def json_file(path: Path, column: str | None) -> Records:
    """Yields the elements of a list, be it the file's value or the only list in its object; or the one record that
    the object is. Files with several objects are JSON lines, whatever their name.
    """
    values = JSONValues(path)
    start = values.peek()
    if start == "{":
        yield from _object(path, COLUMNS if column is None else (column,))
    elif start == "[":
        yield from _elements(path, values)
        if values.peek():
            raise CommandError(f"{path}, line {values.line}: broken JSON: more text after the list")
    elif start:
        raise CommandError(f"{path}, line {values.line}: neither a list nor an object, but {values.value()!r}")


def _elements(path: Path, values: JSONValues) -> Records:
    for number, (line, value) in enumerate(values.elements(), 1):
        yield f"{path}, line {line}, record {number}", value


def _object(path: Path, columns: tuple[str, ...]) -> Records:
    """Yields the records of an object, which is looked through before, as a second list would make it unclear."""
    values = JSONValues(path)
    names, lists, is_record = [], [], False
    for name in values.keys():
        names.append(name)
        if values.peek() == "[":
            value = _first(values)
            lists.append(name)
            is_text = is_message(value)
        else:
            is_text = isinstance(values.value(), str)
        is_record |= is_text and name in columns
    if values.peek():
        yield from json_lines(path)
    elif is_record:
        yield f"{path}, line 1", JSONValues(path).value()
    elif len(lists) == 1:
        yield from _list(path, lists[0])
    else:
        found = f"the lists {', '.join(lists)}" if lists else f"no list, but {', '.join(names) or 'nothing'}"
        raise CommandError(f"{path}, line 1: the object must hold one list of records, it has {found}")


def _first(values: JSONValues) -> Any:
    """Steps over a list, and returns its first element, or None if it is empty."""
    first = None
    for number, (_, value) in enumerate(values.elements()):
        first = first if number else value
    return first


def _list(path: Path, wanted: str) -> Records:
    values = JSONValues(path)
    for name in values.keys():
        if name == wanted:
            yield from _elements(path, values)
            return
        values.value()


def delimited(path: Path, column: str | None, *, delimiter: str) -> Records:
    """Yields the rows of a table, with all columns. Its first row has their names."""
    csv.field_size_limit(1 << 30)  # a text is longer than what Python allows a field
    rows = csv.reader(lines(path), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if names is None:
                names = row
            elif row:
                if len(row) != len(names):
                    raise CommandError(f"{where}: {len(row)} fields, where the first line names {len(names)} columns")
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise CommandError(f"{path}, line {rows.line_num}: {error}") from error


def parquet(path: Path, column: str | None) -> Records:
    """Yields the rows of a Parquet file, of which only the columns are read that are asked for, if it has them."""
    if path.suffix.lower() in COMPRESSED:
        raise CommandError(f"{path}: Parquet is compressed inside: unpack the file")
    try:
        library = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise CommandError(f"{path}: to read Parquet, pip install pyarrow") from error
    number = 0
    try:
        with library.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in (COLUMNS if column is None else (column,))]
            for batch in file.iter_batches(ROWS, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, ValueError, NotImplementedError) as error:  # what pyarrow raises is one of these
        raise CommandError(f"{path}, row {number + 1}: cannot read it: {error}") from error


FORMATS: dict[str, Callable[[Path, str | None], Records]] = {  # by suffix; what has none of these is read as text
    ".jsonl": json_lines,  # of a path, and the column that is asked for
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": partial(delimited, delimiter=","),
    ".tsv": partial(delimited, delimiter="\t"),
    ".parquet": parquet,
}
