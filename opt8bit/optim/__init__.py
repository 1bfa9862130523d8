"""Update rules: optimizers whose states are stored as 8-bit codes; and what those save and cost."""

from opt8bit.optim.adam import Adam8bit, AdamW8bit
from opt8bit.optim.error import state_error
from opt8bit.optim.memory import memory_report
from opt8bit.optim.sgd import SGD8bit

__all__ = ["Adam8bit", "AdamW8bit", "SGD8bit", "memory_report", "state_error"]
