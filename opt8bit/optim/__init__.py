"""Update rules: optimizers whose states are stored as 8-bit codes; and what those save and cost."""

from opt8bit.optim.adagrad import Adagrad8bit
from opt8bit.optim.adam import Adam8bit, AdamW8bit
from opt8bit.optim.ademamix import AdEMAMix8bit
from opt8bit.optim.convert import to_torch_state_dict
from opt8bit.optim.distributed_checkpoint import check_distributed_checkpoint
from opt8bit.optim.distributed_conversion import convert_distributed_checkpoint
from opt8bit.optim.error import state_error
from opt8bit.optim.lamb import LAMB8bit
from opt8bit.optim.lars import LARS8bit
from opt8bit.optim.lion import Lion8bit
from opt8bit.optim.memory import memory_report
from opt8bit.optim.muon import Muon8bit
from opt8bit.optim.muon_adamw import MuonAdamW8bit
from opt8bit.optim.plain import (
    LAMB,
    LARS,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    AdamWScheduleFree,
    AdEMAMix,
    Lion,
    Muon,
    MuonAdamW,
    RMSprop,
)
from opt8bit.optim.rmsprop import RMSprop8bit
from opt8bit.optim.schedule_free import AdamWScheduleFree8bit
from opt8bit.optim.sgd import SGD8bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "AdamWScheduleFree",
    "AdamWScheduleFree8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "Muon",
    "Muon8bit",
    "MuonAdamW",
    "MuonAdamW8bit",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
    "check_distributed_checkpoint",
    "convert_distributed_checkpoint",
    "memory_report",
    "state_error",
    "to_torch_state_dict",
]
