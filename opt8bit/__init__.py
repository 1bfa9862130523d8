"""opt8bit: optimizers for PyTorch whose states take 8 bits; trained weights rounded to few bits, and corrected."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt8bit import ptq as ptq
    from opt8bit.nn import StableEmbedding, replace_embeddings
    from opt8bit.optim import (
        Adagrad8bit,
        Adam8bit,
        AdamW8bit,
        AdamWScheduleFree8bit,
        AdEMAMix8bit,
        LAMB8bit,
        LARS8bit,
        Lion8bit,
        Muon8bit,
        MuonAdamW8bit,
        RMSprop8bit,
        SGD8bit,
        memory_report,
        state_error,
    )
    from opt8bit.ptq import BiasCompensation

    __version__: str

__all__ = [
    "AdEMAMix8bit",
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "AdamWScheduleFree8bit",
    "BiasCompensation",
    "LAMB8bit",
    "LARS8bit",
    "Lion8bit",
    "Muon8bit",
    "MuonAdamW8bit",
    "RMSprop8bit",
    "SGD8bit",
    "StableEmbedding",
    "memory_report",
    "ptq",
    "replace_embeddings",
    "state_error",
]

_FOLDERS = {"StableEmbedding": "nn", "replace_embeddings": "nn", "BiasCompensation": "ptq"}  # of what is not in optim


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and torch with it: the command's help needs neither."""
    if name == "__version__":
        from importlib.metadata import version

        return version("opt8bit")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ptq":
        return importlib.import_module("opt8bit.ptq")
    found = getattr(importlib.import_module(f"opt8bit.{_FOLDERS.get(name, 'optim')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
