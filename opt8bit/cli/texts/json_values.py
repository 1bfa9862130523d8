"""JSON that is longer than memory should hold: the values of a list, one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError
from opt8bit.cli.texts.files import characters

LONGEST = 1 << 24  # characters of a value; one that does not end before is taken for broken
BLANKS = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


class JSONValues:
    """Reads the values of a JSON file in order, and keeps only the one that it is at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = characters(path)
        self._text = ""  # from the last value on that was kept
        self._at = 0
        self._line, self._counted = 1, 0  # the line of a position in the text

    @property
    def line(self) -> int:
        """The line of what comes next."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def peek(self) -> str:
        """Returns the next character that is not blank, or an empty string at the end of the file."""
        while True:
            blank = BLANKS.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self, allowed: str) -> str:
        """Steps over one of the allowed characters and returns it.

        Raises:
            CommandError: something else comes next.
        """
        character = self.peek()
        if not character or character not in allowed:
            found = repr(character) if character else "the end"
            raise CommandError(f"{self._path}, line {self.line}: broken JSON: {found} where one of {allowed} must be")
        self._at += 1
        return character

    def value(self) -> Any:
        """Returns the next value.

        Raises:
            CommandError: it is broken, or does not end.
        """
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                # A number may go on in what has not been read.
                if self._text[end : end + 1] not in ("", *".eE0123456789") or not self._read_on():
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._read_on():
                    at = getattr(error, "pos", self._at)
                    line = self.line + self._text.count("\n", self._at, at)
                    why = getattr(error, "msg", error)
                    raise CommandError(f"{self._path}, line {line}: broken JSON: {why}") from error

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Yields the line and the value of each element of the list that comes next."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            self.peek()
            yield self.line, self.value()
            if self.take(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """Yields the names of the object that comes next. Who asks for another has read the value of the last."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            self.take('"')
            self._at -= 1  # the quote is the name's
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def _read_on(self) -> bool:
        """Reads as much as there is once more, so that a long value is looked at few times; whether there was more."""
        rest = len(self._text) - self._at
        if rest > LONGEST:
            return False
        chunks: list[str] = []
        while sum(map(len, chunks)) <= rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            chunks.append(chunk)
        if chunks:
            self._line = self.line
            self._text, self._at, self._counted = self._text[self._at :] + "".join(chunks), 0, 0
        return bool(chunks)
