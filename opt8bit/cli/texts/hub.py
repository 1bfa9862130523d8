"""Data sets of the ``datasets`` package, by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opt8bit.cli.errors import CommandError

NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*(:[\w.-]+)?)?")  # owner/name, owner/name:config, owner/name:config:split


@dataclass(frozen=True)
class DataSet:
    """A data set's name on the hub."""

    name: str
    config: str | None = None
    split: str = "train"

    @staticmethod
    def of(text: str) -> DataSet | None:
        """Returns the data set that ``owner/name:config:split`` means, or None if the text is no such name.

        Config and split may be missing, and the config empty.
        """
        if not NAME.fullmatch(text):
            return None
        name, config, split = (*text.split(":"), "", "")[:3]
        return DataSet(name, config or None, split or "train")

    def __str__(self) -> str:
        return f"data set {self.name}:{self.config or ''}:{self.split}"

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yields its rows, downloaded as they are asked for, and where they stand.

        Raises:
            CommandError: ``datasets`` is not installed, or cannot load it.
        """
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            raise CommandError(
                f"there is no file {self.name!r}; to look for a data set of that name, pip install datasets"
            ) from error
        number = 0
        try:
            rows = library.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for row in rows:
                number += 1
                yield f"{self}, row {number}", row
        except Exception as error:  # of the network, of the hub, of files of any format
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CommandError(f"{self}, row {number + 1}: cannot load it: {reason}") from error
