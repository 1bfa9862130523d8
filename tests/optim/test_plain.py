"""The optimizers under names without ``8bit``."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import opt8bit.optim
from opt8bit.optim.every import OPTIMIZERS
from opt8bit.optim.plain import PLAIN, AdamWScheduleFree


def test_every_optimizer_has_one() -> None:
    assert [kind.__name__ for kind in PLAIN] == [kind.__name__.removesuffix("8bit") for kind in OPTIMIZERS]
    for kind, of in zip(PLAIN, OPTIMIZERS, strict=True):
        assert issubclass(kind, of) and getattr(opt8bit.optim, kind.__name__) is kind
        assert kind.__name__ in opt8bit.optim.__all__


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_it_steps_saves_and_prints_as_the_other(kind: Any) -> None:
    of: Any = next(each for each in OPTIMIZERS if issubclass(kind, each))
    kinds: tuple[Any, Any] = (kind, of)
    weights = []
    for each in kinds:
        weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        optimizer = each([("layer.weight", weight)], lr=1e-2)
        if kind is AdamWScheduleFree:
            optimizer.train()
        weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        weights.append((weight, optimizer))
    (weight, optimizer), (other, theirs) = weights
    assert torch.equal(weight, other)
    assert repr(optimizer) == repr(theirs).replace("8bit (", " (", 1)
    theirs.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(theirs.state_dict())
    for again in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(again) is kind
        saved, found = optimizer.state_dict()["state"], again.state_dict()["state"]
        assert saved.keys() == found.keys()
        assert all(torch.equal(value, found[key][name]) for key in saved for name, value in saved[key].items())
