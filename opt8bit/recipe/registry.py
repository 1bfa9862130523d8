"""Lists what a recipe can name: each thing in a file of its own, imported when it is used."""

from __future__ import annotations

import importlib
from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

from opt8bit.recipe.gguf_types import GGUF_TYPES
from opt8bit.recipe.objects import FORMAT, GRID, PARAMETRIZATION, ROUNDER, TRANSFORM, Kind


class Registry(Mapping[str, Any]):
    """Maps names to objects.

    Args:
        kind: what they are, for messages.
        places: "module:object" of each.
        base: the class of which they are subclasses, or instances; None for anything.
        instances: whether they are instances.
    """

    def __init__(
        self, kind: str, places: Mapping[str, str], base: Kind | None = None, *, instances: bool = False
    ) -> None:
        self.kind, self._base, self._instances = kind, base, instances
        self._places = dict(places)
        self._found: dict[str, Any] = {}

    def register(self, name: str, found: Any) -> None:
        """Adds an object of your own.

        Raises:
            TypeError: the name is not a string, or the object is none of the registry's class.
            ValueError: the name is taken.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a {self.kind} must be a string, got {name!r}")
        if name in self:
            raise ValueError(f"there is a {self.kind} of the name {name!r} already")
        base = self._base
        if base is not None and not (base.has(found) if self._instances else base.has_class(found)):
            wanted = "an instance" if self._instances else "a subclass, not an instance,"
            raise TypeError(f"{self.kind} {name!r} must be {wanted} of {base.name}, got {found!r}")
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
    ROUNDER,
)
TRANSFORMS = Registry(  # classes, subclasses of Transform
    "transforms",
    {
        "fold_norm": "opt8bit.ptq.transforms.fold_norm:FoldNorm",
    },
    TRANSFORM,
)
RECONSTRUCTIONS = Registry(  # classes, subclasses of Parametrization
    "reconstruction",
    {
        "scales": "opt8bit.ptq.reconstruction.scales:TrainScales",
        "rounding": "opt8bit.ptq.reconstruction.rounding:TrainRounding",
    },
    PARAMETRIZATION,
)
GRIDS = Registry(  # classes, subclasses of Grid, that take a range
    "grid",
    {
        "nvfp4": "opt8bit.quant.float4:NVFP4Grid",
        "mxfp4": "opt8bit.quant.float4:MXFP4Grid",
    },
    GRID,
)
NAMED_GRIDS: Mapping[str, Any] = ChainMap(GRIDS, GGUF_TYPES)  # type: ignore[arg-type]  # all that a recipe may name
FORMATS = Registry(  # instances of CheckpointFormat
    "format",
    {
        "compressed-tensors": "opt8bit.ptq.export.compressed_tensors:FORMAT",
        "gptq": "opt8bit.ptq.export.gptq:FORMAT",
        "mlx": "opt8bit.ptq.export.mlx:FORMAT",
        "gguf": "opt8bit.ptq.export.gguf.format:FORMAT",
        "dense": "opt8bit.ptq.export.dense:FORMAT",
    },
    FORMAT,
    instances=True,
)
