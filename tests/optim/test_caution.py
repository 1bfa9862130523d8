"""caution=True: which elements move, how far, and where it is refused. The oracles are in the table of cases."""

from typing import Any

import pytest
import torch
from cases import gradients, parameter, train, use
from torch import nn

import opt8bit
from opt8bit.optim.caution import LEAST_SHARE, caution_mask

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (opt8bit.AdamW8bit, {"weight_decay": 0.0}),
    "Adam": (opt8bit.Adam8bit, {}),
    "Lion": (opt8bit.Lion8bit, {}),
    "SGD": (opt8bit.SGD8bit, {"momentum": 0.9}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", KINDS)
def test_no_element_moves_against_its_gradient(
    name: str, bits: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And states are those without caution, bit for bit, as they do not depend on the parameter here."""
    use(monkeypatch, backend)
    kind, hyper = KINDS[name]
    params = [parameter(), parameter()]
    optimizers = [
        kind([param], lr=0.1, state_bits=bits, caution=caution, **hyper)
        for param, caution in zip(params, (True, False), strict=True)
    ]
    against = 0
    for grad in gradients(4):
        before = [param.detach().clone() for param in params]
        for param, optimizer in zip(params, optimizers, strict=True):
            train(optimizer, param, [grad])
        moved = [old - param.detach() for old, param in zip(before, params, strict=True)]
        assert not (moved[0] * grad < 0).any()
        against += int((moved[1] * grad < 0).sum())
        states = [optimizer.state[param] for param, optimizer in zip(params, optimizers, strict=True)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert against > 100


def test_the_share_has_a_floor(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9600 elements, one agrees: its step is 1 / LEAST_SHARE as long, not 9600 times."""
    use(monkeypatch, backend)
    param = nn.Parameter(torch.zeros(32, 300))
    optimizer = opt8bit.SGD8bit([param], lr=1.0, momentum=1.0, caution=True, state_bits=32)
    train(optimizer, param, [torch.ones(32, 300)])
    torch.testing.assert_close(param.detach(), torch.full((32, 300), -1.0))
    grad = torch.full((32, 300), -0.5)  # against the momentum, which stays above zero
    grad[3, 7] = 1
    train(optimizer, param, [grad])
    expected = torch.full((32, 300), -1.0)
    expected[3, 7] -= 2 / LEAST_SHARE
    torch.testing.assert_close(param.detach(), expected)


def test_signs_are_compared_and_not_products() -> None:
    """A product of these would be zero in float32."""
    tiny = torch.tensor([1e-30, -1e-30, 1e-30, 0.0])
    assert caution_mask(tiny, torch.tensor([1e-30, -1e-30, -1e-30, 1.0])).tolist() == [2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("name", KINDS)
def test_it_is_an_option_of_a_group_and_of_the_state_dict(name: str) -> None:
    kind, hyper = KINDS[name]
    params = [parameter(), parameter(1)]
    optimizer = kind([{"params": params[:1], "caution": True}, {"params": params[1:]}], **hyper)
    assert [optimizer.rule(group).caution for group in optimizer.param_groups] == [True, False]
    other = kind([{"params": params[:1]}, {"params": params[1:]}], **hyper)
    other.load_state_dict(optimizer.state_dict())
    assert [group["caution"] for group in other.param_groups] == [True, False]
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["caution"]  # as versions of before have saved it
    optimizer.load_state_dict(old)
    assert [group["caution"] for group in optimizer.param_groups] == [True, False]


def test_the_whole_parameter_decides_and_not_a_block() -> None:
    params = [parameter(), parameter()]
    for param, block_size in zip(params, (16, 256), strict=True):
        optimizer = opt8bit.SGD8bit([param], momentum=0.9, caution=True, block_size=block_size, state_bits=32)
        train(optimizer, param, gradients(3))
    assert torch.equal(*params)


@pytest.mark.parametrize(
    ("kind", "hyper", "message"),
    [
        (opt8bit.AdamW8bit, {"caution": 1}, "caution must be True or False, got 1"),
        (opt8bit.SGD8bit, {"caution": True}, "caution=True takes momentum, .* got momentum=0"),
        (opt8bit.LAMB8bit, {"caution": True}, "caution must be False for LAMB8bit, whose rule does not have it"),
        (opt8bit.Muon8bit, {"caution": True}, "caution must be False for Muon8bit, whose rule does not have it"),
        (opt8bit.RMSprop8bit, {"caution": True}, "caution must be False for RMSprop8bit"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind: Any, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([parameter()], **hyper)


def test_to_torch_refuses_it() -> None:
    with pytest.raises(ValueError, match=r"torch.optim.AdamW has no caution, got True"):
        opt8bit.optim.to_torch_state_dict(opt8bit.AdamW8bit([parameter()], caution=True))
