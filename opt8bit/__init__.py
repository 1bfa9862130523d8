"""opt8bit: optimizers for PyTorch whose states take 8 bits; trained weights rounded to few bits, and corrected."""

from importlib.metadata import version

from opt8bit import ptq
from opt8bit.nn import StableEmbedding, replace_embeddings
from opt8bit.optim import (
    Adagrad8bit,
    Adam8bit,
    AdamW8bit,
    AdEMAMix8bit,
    LAMB8bit,
    LARS8bit,
    Lion8bit,
    Muon8bit,
    RMSprop8bit,
    SGD8bit,
    memory_report,
    state_error,
)

__version__ = version("opt8bit")

__all__ = [
    "AdEMAMix8bit",
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion8bit",
    "Muon8bit",
    "RMSprop8bit",
    "SGD8bit",
    "StableEmbedding",
    "memory_report",
    "ptq",
    "replace_embeddings",
    "state_error",
]
