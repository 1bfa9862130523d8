"""Every optimizer under a name without ``8bit``.

PEFT, sd-scripts and other trainers import bitsandbytes for each class whose name ends in ``8bit``. They take these as
they take those of torch.optim. Each is a class of its own, as an alias would have the name of the class it stands for.
"""

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


class AdamW(AdamW8bit):
    """Is :class:`AdamW8bit` under another name."""


class Adam(Adam8bit):
    """Is :class:`Adam8bit` under another name."""


class SGD(SGD8bit):
    """Is :class:`SGD8bit` under another name."""


class RMSprop(RMSprop8bit):
    """Is :class:`RMSprop8bit` under another name."""


class Adagrad(Adagrad8bit):
    """Is :class:`Adagrad8bit` under another name."""


class Lion(Lion8bit):
    """Is :class:`Lion8bit` under another name."""


class LAMB(LAMB8bit):
    """Is :class:`LAMB8bit` under another name."""


class LARS(LARS8bit):
    """Is :class:`LARS8bit` under another name."""


class AdEMAMix(AdEMAMix8bit):
    """Is :class:`AdEMAMix8bit` under another name."""


class Muon(Muon8bit):
    """Is :class:`Muon8bit` under another name."""


class MuonAdamW(MuonAdamW8bit):
    """Is :class:`MuonAdamW8bit` under another name."""


class AdamWScheduleFree(AdamWScheduleFree8bit):
    """Is :class:`AdamWScheduleFree8bit` under another name."""


PLAIN: tuple[type[Optimizer8bit], ...] = (
    *(AdamW, Adam, SGD, RMSprop, Adagrad, Lion, LAMB, LARS, AdEMAMix, Muon),
    *(MuonAdamW, AdamWScheduleFree),
)
