"""Objects that may stand in place of names. Whether something is one is asked without an import of its class."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A class, known by its place.

    Attributes:
        module, name: of the class.
        words: what one is called in messages.
    """

    module: str
    name: str
    words: str

    def has(self, value: object) -> bool:
        """Returns whether a value is an instance of the class."""
        owner = self._class()
        return owner is not None and isinstance(value, owner)

    def has_class(self, value: object) -> bool:
        """Returns whether a value is a subclass of the class."""
        owner = self._class()
        return owner is not None and isinstance(value, type) and issubclass(value, owner)

    def _class(self) -> Any:
        module = sys.modules.get(self.module)  # whoever has an instance has imported its class
        return None if module is None else getattr(module, self.name)


ROUNDER = Kind("opt8bit.ptq.rounding.rounder", "Rounder", "one of opt8bit.ptq, such as GPTQ(), or a name")
TRANSFORM = Kind("opt8bit.ptq.transforms.transform", "Transform", "names, or transforms")
PARAMETRIZATION = Kind("opt8bit.ptq.reconstruction.parametrization", "Parametrization", "such as TrainScales()")
RECONSTRUCTION = Kind("opt8bit.ptq.reconstruction.engine", "Reconstruction", "a name, or a Reconstruction")
LOSS_WEIGHTING = Kind("opt8bit.ptq.calibration.loss_weighting", "LossWeighting", "a name, or a LossWeighting")
FORMAT = Kind("opt8bit.ptq.export.checkpoint_format", "CheckpointFormat", "a CheckpointFormat")
GRID = Kind("opt8bit.quant.grid", "Grid", "a name, or one of opt8bit.quant, such as UniformGrid(4)")
# Options that may have a name instead.
NAMED = {"method": ROUNDER, "loss_weighting": LOSS_WEIGHTING, "reconstruction": RECONSTRUCTION, "grid": GRID}


def check_objects(recipe: Any) -> None:
    """Checks what a :class:`Recipe` has in place of names.

    Raises:
        TypeError: something is neither a name nor an object of its class, or an object cannot be hashed.
    """
    for name, kind in NAMED.items():
        value = getattr(recipe, name)
        if not isinstance(value, str | None):
            _check(name, value, kind)
    for each in recipe.transforms if isinstance(recipe.transforms, tuple) else ():
        if not isinstance(each, str):
            _check("transforms", each, TRANSFORM)


def _check(name: str, value: Any, kind: Kind) -> None:
    """
    Raises:
        TypeError: a value is not an object of its class, or cannot be hashed.
    """
    if kind.has_class(value):
        raise TypeError(f"{name} must be {kind.words}, got the class {value.__name__}: say {value.__name__}()")
    if not kind.has(value):
        raise TypeError(f"{name} must be {kind.words}, got {value!r}")
    try:
        hash(value)  # what is alike is planned once
    except TypeError as error:
        raise TypeError(
            f"{name}={value!r} cannot be hashed, as its fields may change: make {type(value).__name__} a "
            "@dataclass(frozen=True) with fields that can be"
        ) from error
