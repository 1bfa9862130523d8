"""What a recipe can name: each thing in a file of its own, and a line here. Nothing is imported before it is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Registry(Mapping[str, Any]):
    """Objects by name.

    Args:
        kind: what they are, for messages.
        places: "module:object" of each.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)
        self._found: dict[str, Any] = {}

    def register(self, name: str, found: Any) -> None:
        """Adds an object of your own.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"there is a {self.kind} of the name {name!r} already")
        self._found[name] = found

    def __getitem__(self, name: str) -> Any:
        if name in self._found:
            return self._found[name]
        module, _, found = self._places[name].partition(":")
        return getattr(importlib.import_module(module), found)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter((*self._places, *self._found))

    def __len__(self) -> int:
        return len(self._places) + len(self._found)

    def check(self, name: object) -> None:
        """
        Raises:
            ValueError: nothing has that name.
        """
        if name not in self:
            raise ValueError(f"{self.kind} must be one of {', '.join(self)}, got {name!r}")


ROUNDERS = Registry(  # classes, subclasses of Rounder
    "method",
    {
        "rtn": "opt8bit.ptq.rounding.rtn:RTN",
        "gptq": "opt8bit.ptq.rounding.gptq:GPTQ",
        "quantease": "opt8bit.ptq.rounding.quantease:QuantEase",
    },
)
TRANSFORMS = Registry(  # classes, subclasses of Transform
    "transforms",
    {
        "fold_norm": "opt8bit.ptq.transforms.fold_norm:FoldNorm",
    },
)
RECONSTRUCTIONS = Registry(  # classes, subclasses of Parametrization
    "reconstruction",
    {
        "scales": "opt8bit.ptq.reconstruction.scales:TrainScales",
    },
)
FORMATS = Registry(  # instances of CheckpointFormat
    "format",
    {
        "compressed-tensors": "opt8bit.ptq.export.compressed_tensors:FORMAT",
        "gptq": "opt8bit.ptq.export.gptq:FORMAT",
        "dense": "opt8bit.ptq.export.dense:FORMAT",
    },
)
