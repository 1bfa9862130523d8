"""The table by which an optimizer enters the contract, and what its tests share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from oracles import (
    LAMB,
    LARS,
    AdamWScheduleFree,
    AdEMAMix,
    CautiousAdam,
    CautiousAdamW,
    CautiousLion,
    CautiousSGD,
    Lion,
    MuonAdamW,
)
from torch import Tensor, nn

import opt8bit
from opt8bit.optim.base import Optimizer8bit

SHAPE = (32, 300)  # 9600 elements, with a short block at the end of each row


class Case(NamedTuple):
    ours: Callable[..., Optimizer8bit]
    oracle: type[torch.optim.Optimizer]  # the same with full states: torch's own where there is one
    hyper: dict[str, Any]


LR64 = torch.tensor(0.01, dtype=torch.float64)


def schedule_free(params: Any, **hyper: Any) -> opt8bit.AdamWScheduleFree8bit:
    """In train mode, as it has to be for a step."""
    optimizer = opt8bit.AdamWScheduleFree8bit(params, **hyper)
    optimizer.train()
    return optimizer


ADAM: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weight decay": {"weight_decay": 0.1},
    "no weight decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.05},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True},
    "betas, eps": {"betas": (0.8, 0.95), "eps": 1e-3},
    "betas of zero": {"betas": (0.0, 0.0)},
    "tensor lr": {"lr": LR64},
}
VARIANTS: list[tuple[Callable[..., Optimizer8bit], type[torch.optim.Optimizer], dict[str, dict[str, Any]]]] = [
    (opt8bit.AdamW8bit, torch.optim.AdamW, ADAM),
    (opt8bit.Adam8bit, torch.optim.Adam, {**ADAM, "decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1}}),
    (
        opt8bit.SGD8bit,
        torch.optim.SGD,
        {
            "defaults": {},
            "momentum": {"momentum": 0.9},
            "dampening": {"momentum": 0.9, "dampening": 0.5},
            "nesterov": {"momentum": 0.9, "nesterov": True},
            "weight decay": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.1},
            "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "no momentum, weight decay": {"weight_decay": 0.1},
            "tensor lr": {"momentum": 0.9, "lr": LR64},
        },
    ),
    (
        opt8bit.RMSprop8bit,
        torch.optim.RMSprop,
        {
            "defaults": {},
            "momentum": {"momentum": 0.9, "weight_decay": 0.1},
            "centered": {"centered": True},
            "centered, momentum": {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "alpha": 0.9},
            "maximize": {"maximize": True, "weight_decay": 0.1, "eps": 1e-3},
            "tensor lr": {"lr": LR64},
        },
    ),
    (
        opt8bit.Adagrad8bit,
        torch.optim.Adagrad,
        {
            "defaults": {},
            "decay": {"lr_decay": 0.1, "weight_decay": 0.1},
            "initial value": {"initial_accumulator_value": 0.25},
            "maximize": {"maximize": True, "weight_decay": 0.1, "eps": 1e-3},
            "tensor lr": {"lr": LR64},
        },
    ),
    (
        opt8bit.Lion8bit,
        Lion,
        {
            "defaults": {},
            "weight decay": {"weight_decay": 0.1, "lr": 1e-2},
            "maximize": {"maximize": True, "betas": (0.8, 0.95)},
            "tensor lr": {"lr": LR64},
        },
    ),
    (
        opt8bit.LAMB8bit,
        LAMB,
        {
            "defaults": {},
            "no bias correction": {"bias_correction": False, "weight_decay": 0.1},
            "not adapted": {"adapt": False},
            "maximize": {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-3},
            "tensor lr": {"lr": LR64},
        },
    ),
    (
        opt8bit.LARS8bit,
        LARS,
        {
            "defaults": {},
            "weight decay": {"weight_decay": 0.1, "lr": 10.0},
            "nesterov": {"nesterov": True, "trust_coefficient": 0.1, "eps": 1.0},
            "no momentum": {"momentum": 0, "weight_decay": 0.1},
            "not adapted": {"adapt": False, "lr": 0.1, "maximize": True},
            "tensor lr": {"lr": LR64},
        },
    ),
    (
        opt8bit.AdEMAMix8bit,
        AdEMAMix,
        {
            "defaults": {},
            "schedules": {"t_alpha": 4, "t_beta3": 4},
            "weight decay": {"weight_decay": 0.1, "alpha": 2.0, "betas": (0.8, 0.95, 0.99)},
            "maximize": {"maximize": True, "eps": 1e-3},
            "tensor lr": {"lr": LR64},
        },
    ),
    (
        opt8bit.MuonAdamW8bit,
        MuonAdamW,
        {
            "AdamW": {"use_muon": False},
            "AdamW, betas": {"use_muon": False, "betas": (0.8, 0.95), "weight_decay": 0.05},
            "AdamW, maximize": {"use_muon": False, "maximize": True},
            "AdamW, tensor lr": {"use_muon": False, "lr": LR64},
        },
    ),
    (
        opt8bit.AdamW8bit,
        CautiousAdamW,
        {
            "caution": {"caution": True, "weight_decay": 0.1},
            "caution, amsgrad": {"caution": True, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        },
    ),
    (
        opt8bit.Adam8bit,
        CautiousAdam,
        {
            "caution": {"caution": True, "weight_decay": 0.1, "betas": (0.8, 0.95)},
            "caution, maximize": {"caution": True, "weight_decay": 0.1, "maximize": True},
            "caution, amsgrad": {"caution": True, "weight_decay": 0.1, "amsgrad": True},
        },
    ),
    (
        opt8bit.Lion8bit,
        CautiousLion,
        {
            "caution": {"caution": True, "weight_decay": 0.1, "lr": 1e-2},
            "caution, maximize": {"caution": True, "maximize": True},
        },
    ),
    (
        opt8bit.SGD8bit,
        CautiousSGD,
        {
            "caution": {"caution": True, "momentum": 0.9, "weight_decay": 0.1, "lr": 0.01},
            "caution, nesterov": {"caution": True, "momentum": 0.9, "nesterov": True, "maximize": True},
            "caution, dampening": {"caution": True, "momentum": 0.9, "dampening": 0.5},
        },
    ),
    (
        schedule_free,
        AdamWScheduleFree,
        {
            "defaults": {},
            "warmup": {"warmup_steps": 3, "weight_decay": 0.1},
            "powers": {"r": 0.5, "weight_lr_power": 1.0, "betas": (0.95, 0.99), "eps": 1e-3},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor lr": {"lr": LR64},
        },
    ),
]
# Its iterations run in bfloat16: see test_muon.py for how it is held against torch.optim.Muon.
MUON = {
    "Muon8bit defaults": Case(opt8bit.Muon8bit, torch.optim.Muon, {}),
    "Muon8bit plain momentum": Case(opt8bit.Muon8bit, torch.optim.Muon, {"nesterov": False, "weight_decay": 0.0}),
    "MuonAdamW8bit Muon": Case(opt8bit.MuonAdamW8bit, MuonAdamW, {"use_muon": True}),
}
CASES: dict[str, Case] = {
    f"{ours.__name__} {name}": Case(ours, oracle, hyper)
    for ours, oracle, variants in VARIANTS
    for name, hyper in variants.items()
}
STATEFUL: dict[str, Case] = {
    **{
        name: CASES[name]
        for name in (
            "AdamW8bit weight decay",
            "AdamW8bit amsgrad",
            "Adam8bit weight decay",
            "SGD8bit momentum",
            "RMSprop8bit defaults",
            "RMSprop8bit centered, momentum",
            "Adagrad8bit decay",
            "Lion8bit weight decay",
            "LAMB8bit defaults",
            "LARS8bit weight decay",
            "AdEMAMix8bit schedules",
            "AdamW8bit caution",
            "Lion8bit caution",
            "SGD8bit caution",
        )
    },
    "MuonAdamW8bit AdamW": CASES["MuonAdamW8bit AdamW"],
    "Muon8bit defaults": MUON["Muon8bit defaults"],
    "MuonAdamW8bit Muon": MUON["MuonAdamW8bit Muon"],
}
ANY_SHAPE = {name: case for name, case in STATEFUL.items() if name not in MUON}


def one_of_each_rule() -> dict[str, str]:
    """By rule that has kernels, the name of the case with most hyper-parameters."""
    found: dict[str, str] = {}
    for name, case in sorted(CASES.items(), key=lambda item: len(item[1].hyper)):
        found[rule_of(case)] = name
    return found


def rule_of(case: Case) -> str:
    """The name of the rule that a case steps by."""
    optimizer = case.ours([{"params": []}], **case.hyper)
    return optimizer.rule(optimizer.param_groups[0]).name


def parameter(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> list[Tensor]:
    """Gradients whose size varies over six decades, from one element to the next."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(shape, generator=generator).mul(3).clamp(-7, 7).exp()
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def train(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()


UNSIGNED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance", "sum"}  # states that are never negative


def assert_states_agree(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], *, share: float, rtol: float, atol: float = 0.0
) -> None:
    """States in blocks of 256 that two backends made: values agree as float32 does, codes differ by one level at most.

    Args:
        share: of the elements of a state whose codes may differ; one may in any case, if any.
    """
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype
        if name.endswith("_codes"):
            state = name.removesuffix("_codes")
            distance, is_mirrored = levels_apart(state, mine, theirs)
            assert not distance.numel() or int(distance.max()) <= 1
            assert int((distance[~is_mirrored] > 0).sum()) <= (max(share * value.numel(), 1) if share else 0)
        elif value.dtype == torch.uint8:
            assert torch.equal(mine[name], value)
        else:
            is_scale = name.endswith("_scale")
            pair = (mine[name].abs(), value.abs()) if is_scale else (mine[name], value)
            torch.testing.assert_close(*pair, rtol=rtol, atol=atol)


def levels_apart(state: str, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns how many levels lie between two stored states, and which elements are in a block of opposite scales.

    A block's largest elements of either sign may be equal up to rounding; then it decides which sign the scale has. Of
    such a block levels are counted after one side is mirrored, and each element may be one apart: there is no -1.
    """
    codes = [each[f"{state}_codes"] for each in (mine, theirs)]
    scales = [each[f"{state}_scale"] for each in (mine, theirs)]
    if state in UNSIGNED:
        distance = (codes[0].int() - codes[1].int()).abs()
        return distance, torch.zeros_like(distance, dtype=torch.bool)
    length = codes[0].numel() // max(scales[0].shape[0], 1)
    is_opposite = (scales[0] < 0) != (scales[1] < 0)
    is_mirrored = is_opposite.repeat_interleave(256, 1)[:, :length].reshape(codes[0].shape)
    ranks = [(each.int() + 127) % 256 for each in codes]  # of ascending values, 127 that of zero
    distance = (torch.where(is_mirrored, 254 - ranks[0], ranks[0]) - ranks[1]).abs()
    for rank in ranks:  # there are elements of both signs that are the largest
        is_tie = torch.zeros_like(is_opposite)
        for block, part in enumerate(rank.reshape(scales[0].shape[0], -1).split(256, 1)):
            is_tie[:, block] = (part == 0).any(1) & (part == 255).any(1)
        assert is_tie[is_opposite].all()
    return distance, is_mirrored


def use(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("OPT8BIT_BACKEND", backend)
