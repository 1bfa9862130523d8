"""Update rules: optimizers whose states are stored as 8-bit codes."""

from opt8bit.optim.adam import Adam8bit, AdamW8bit
from opt8bit.optim.sgd import SGD8bit

__all__ = ["Adam8bit", "AdamW8bit", "SGD8bit"]
