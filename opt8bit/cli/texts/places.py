"""Finds a text: in a file, in the files of a folder, or in a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError
from opt8bit.cli.texts.files import characters, kind
from opt8bit.cli.texts.formats import FORMATS
from opt8bit.cli.texts.hub import DataSet
from opt8bit.cli.texts.records import text_of

SEPARATOR = "\n\n"  # between records, and between files, as in the usual reading of WikiText


@dataclass(frozen=True)
class Text:
    """A text that has been found and not been read yet."""

    name: str  # as the user has it
    sources: tuple[Path | DataSet, ...]
    column: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether reading downloads."""
        return any(isinstance(source, DataSet) for source in self.sources)

    @property
    def can_be_read_again(self) -> bool:
        """Whether this is no pipe, which is empty once it has been read."""
        return all(isinstance(source, DataSet) or source.is_file() for source in self.sources)

    def pieces(self, tokenizer: Any) -> Iterator[str]:
        """Yields the text from its start, in pieces of any length: records in order, joined by blank lines.

        What is wrong with a source is found when it is read, so that the end of a long one stays unseen.

        Args:
            tokenizer: of the model; it renders chats.

        Raises:
            CommandError: a source cannot be read, or has nothing in it, or records that are unclear.
        """
        for number, source in enumerate(self.sources):
            if number:
                yield SEPARATOR
            is_empty = True
            for piece in self._of(source, tokenizer):
                is_empty = False
                yield piece
            if is_empty:
                raise CommandError(f"{source} is empty")

    def _of(self, source: Path | DataSet, tokenizer: Any) -> Iterator[str]:
        if isinstance(source, DataSet):
            records = source.records()
        elif kind(source) in FORMATS:
            records = FORMATS[kind(source)](source, self.column)
        else:
            yield from characters(source)
            return
        separator = ""
        for where, record in records:
            yield separator + text_of(record, where, self.column, tokenizer)
            separator = SEPARATOR


def find_text(place: str, column: str | None = None) -> Text:
    """Finds a text, and reads nothing of it.

    Args:
        place: a file, a folder of files, or a data set as ``owner/name:config:split``. What is on the disk goes first.
        column: of the records, the one with the text; for files that are no records, None.

    Raises:
        CommandError: there is none, or a folder has both texts and records.
    """
    path = Path(place).expanduser()
    data_set = DataSet.of(place)
    if path.is_dir():
        sources: tuple[Path | DataSet, ...] = _files(path)
    elif path.exists() or data_set is None or kind(path) in (*FORMATS, ".txt", ".md"):
        if not path.exists():
            raise CommandError(f"cannot read {place!r}: there is no such file or folder")
        sources = (path,)
    else:
        sources = (data_set,)
    plain = [source for source in sources if isinstance(source, Path) and kind(source) not in FORMATS]
    if column is not None and plain:
        raise CommandError(f"--text-column {column}: {plain[0]} is a text and has no columns")
    if plain and len(plain) < len(sources):
        other = next(source for source in sources if source not in plain)
        raise CommandError(f"{place}: {plain[0]} is a text and {other} has records: give one of them")
    return Text(place, sources, column)


def _files(folder: Path) -> tuple[Path, ...]:
    """Returns the files of a folder and its folders in the order of their names, except hidden ones.

    Raises:
        CommandError: there is none.
    """
    inside = {path.relative_to(folder).parts: path for path in folder.rglob("*") if path.is_file()}
    found = [path for parts, path in sorted(inside.items()) if not any(part.startswith(".") for part in parts)]
    if not found:
        raise CommandError(f"{str(folder)!r} has no files")
    return tuple(found)
