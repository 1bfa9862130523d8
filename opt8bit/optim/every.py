"""Every optimizer of the package: what reports, tests and benchmarks go through."""

from opt8bit.optim.adagrad import Adagrad8bit
from opt8bit.optim.adam import Adam8bit, AdamW8bit
from opt8bit.optim.ademamix import AdEMAMix8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.lamb import LAMB8bit
from opt8bit.optim.lars import LARS8bit
from opt8bit.optim.lion import Lion8bit
from opt8bit.optim.muon import Muon8bit
from opt8bit.optim.muon_adamw import MuonAdamW8bit
from opt8bit.optim.rmsprop import RMSprop8bit
from opt8bit.optim.schedule_free import AdamWScheduleFree8bit
from opt8bit.optim.sgd import SGD8bit

OPTIMIZERS: tuple[type[Optimizer8bit], ...] = (
    *(AdamW8bit, Adam8bit, SGD8bit, RMSprop8bit, Adagrad8bit),
    *(Lion8bit, LAMB8bit, LARS8bit, AdEMAMix8bit, Muon8bit, MuonAdamW8bit, AdamWScheduleFree8bit),
)
