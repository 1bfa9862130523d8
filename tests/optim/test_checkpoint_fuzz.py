"""Damaged state dicts, 13,000 of them: each is refused cleanly, with nothing changed, or loaded right.

They are of all dialects, of this layout and of the one before.
"""

import copy
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from layouts_before import old_state_dict
from torch import Tensor, nn

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.dialects.dialect import NOT_OTHERS
from opt8bit.optim.states import COMPENSATION, check

COUNT = 13_000
SHAPES = ((16, 24), (5,))  # in two groups; codes and a scale for each of two blocks a row, and full states


class Case(NamedTuple):
    ours: type[Optimizer8bit]
    hyper: dict[str, Any]
    dtype: torch.dtype
    made: Callable[[list[nn.Parameter]], dict[str, Any]]  # a state dict of these parameters


def own(ours: type[Optimizer8bit], hyper: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """State dicts of ours, in blocks of another size than the optimizer's that loads it where ``options`` say so."""
    return Case(ours, hyper, dtype, lambda params: trained(make(ours, params, {**hyper, **options})))


def before(case: Case) -> Case:
    """The same in the layout before: state dicts of ours only."""

    def made(params: list[nn.Parameter]) -> dict[str, Any]:
        optimizer = make(case.ours, params, case.hyper)
        optimizer.load_state_dict(case.made(params))
        return old_state_dict(optimizer)

    return case._replace(made=made)


def torchs(ours: type[Optimizer8bit], theirs: type[torch.optim.Optimizer], **hyper: Any) -> Case:
    return Case(ours, {}, torch.float32, lambda params: trained(theirs(params, **hyper)))


def bitsandbytes(ours: type[Optimizer8bit], states: int, bits: int) -> Case:
    return Case(ours, {}, torch.float32, lambda params: made_as_bitsandbytes(params, states, bits))


CASES: dict[str, Case] = {
    "AdamW": own(opt8bit.AdamW8bit, {"amsgrad": True}),
    "AdamW, other blocks": own(opt8bit.AdamW8bit, {}, block_size=32),
    "AdamW, 32 bits": own(opt8bit.AdamW8bit, {}, state_bits=32),
    "AdamW, compensated": own(opt8bit.AdamW8bit, {"compensation": True}, torch.bfloat16),
    "SGD": own(opt8bit.SGD8bit, {"momentum": 0.9}),
    "RMSprop": own(opt8bit.RMSprop8bit, {"centered": True, "momentum": 0.9}),
    "AdEMAMix": own(opt8bit.AdEMAMix8bit, {}, block_size=64),
    "AdamW, before": before(own(opt8bit.AdamW8bit, {"amsgrad": True})),
    "AdamW, compensated, before": before(own(opt8bit.AdamW8bit, {"compensation": True}, torch.bfloat16)),
    "SGD, before": before(own(opt8bit.SGD8bit, {"momentum": 0.9})),
    "RMSprop, before": before(own(opt8bit.RMSprop8bit, {"centered": True, "momentum": 0.9})),
    "torch AdamW": torchs(opt8bit.AdamW8bit, torch.optim.AdamW, amsgrad=True),
    "torch SGD": torchs(opt8bit.SGD8bit, torch.optim.SGD, momentum=0.9),
    "torch RMSprop": torchs(opt8bit.RMSprop8bit, torch.optim.RMSprop, centered=True),
    "torch Adagrad": torchs(opt8bit.Adagrad8bit, torch.optim.Adagrad),
    "bitsandbytes Adam, 8 bits": bitsandbytes(opt8bit.Adam8bit, 2, 8),
    "bitsandbytes Lion, 8 bits": bitsandbytes(opt8bit.Lion8bit, 1, 8),
    "bitsandbytes Adam, 32 bits": bitsandbytes(opt8bit.Adam8bit, 2, 32),
}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype)) for shape in SHAPES]


def make(ours: type[Optimizer8bit], params: list[nn.Parameter], hyper: dict[str, Any]) -> Optimizer8bit:
    groups = [{"params": [param]} for param in params]
    return ours(groups, **{"min_8bit_size": 0, "block_size": 16, **hyper})


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.linspace(-2, 1, param.numel()).reshape(param.shape).to(param.dtype)
    optimizer.step()


def trained(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    step(optimizer)
    step(optimizer)
    state_dict = optimizer.state_dict()
    if len(state_dict["param_groups"]) == 1:  # of torch.optim, which took the parameters alone
        group = state_dict["param_groups"][0]
        state_dict["param_groups"] = [{**group, "params": [key]} for key in group["params"]]
    return copy.deepcopy(state_dict)


def made_as_bitsandbytes(params: list[nn.Parameter], states: int, bits: int) -> dict[str, Any]:
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    result: dict[int, Any] = {}
    for key, param in enumerate(params):
        tensors: dict[str, Tensor] = {}
        for number, signed in ((1, True), (2, False))[:states]:
            values = torch.linspace(-1 if signed else 0, 1, param.numel()).reshape(param.shape)
            if bits == 8 and param.dim() > 1:
                codebook = opt8bit.quant.dynamic_map(signed)
                codes, absmax = opt8bit.quant.quantize_blockwise(values.reshape(1, -1), codebook, 256)
                values = codes.reshape(param.shape)
                tensors |= {f"qmap{number}": codebook, f"absmax{number}": absmax[0]}
            tensors[f"state{number}"] = values
        result[key] = {"step": 2, "__bnb_optimizer_quant_state__": tensors}
    return {"state": result, "param_groups": [{**group, "params": [key]} for key in result]}


# What a value is replaced by: of every kind, and of every way to be no number

FREED = torch.zeros(16, 24)
FREED.untyped_storage().resize_(0)
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 7.5, -0.5, math.nan, math.inf, -math.inf, 2**70, 10**400, 1j, "0.1", b"x", "", print),
    *([], [1.0], (), (0.5,), (0.5, 0.5), (0.5, "a"), (2.0, -1.0), {}, {"a": 1}, {1, 2}, object(), range(2)),
    *(torch.zeros(()), torch.tensor(math.nan), torch.tensor(-2.0), torch.tensor(5), torch.tensor(True), FREED),
    *(torch.zeros(0), torch.zeros(3), torch.zeros(16, 24), torch.zeros(16, 24, dtype=torch.uint8), torch.zeros(16, 2)),
    *(torch.zeros(2, dtype=torch.complex64), torch.zeros(16, 24).to_sparse(), torch.zeros(16, 24, device="meta")),
    *(nn.Parameter(torch.ones(5)), torch.ones(1, requires_grad=True) * 2, nn.Linear(2, 2)),
)


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.reshape(-1)[:1] = value if tensor.is_floating_point() else 255
        return tensor

    return change


TENSOR_DAMAGES: tuple[Callable[[Tensor], Any], ...] = (
    lambda tensor: tensor[:-1] if tensor.dim() else tensor[None],
    lambda tensor: tensor[..., :-1] if tensor.dim() else tensor,
    lambda tensor: tensor.flatten(),
    lambda tensor: tensor[None],
    lambda tensor: tensor.t() if tensor.dim() == 2 else tensor,
    lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor,
    lambda tensor: tensor[:1].expand(tensor.shape) if tensor.dim() else tensor,
    lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    lambda tensor: tensor.new_zeros(0),
    lambda tensor: tensor.to_sparse() if tensor.dim() else tensor,
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.numpy() if not tensor.requires_grad and tensor.dtype != torch.bfloat16 else None,
    lambda tensor: tensor.tolist(),
    lambda tensor: nn.Parameter(tensor, requires_grad=False),
    *(
        lambda tensor, dtype=dtype: tensor.to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)
    ),
    *(poisoned(value) for value in (math.nan, math.inf, -math.inf, -1.0, 3e38)),
    lambda tensor: -tensor if tensor.dtype != torch.bool else tensor,
)


class Damage:
    """One random change of a state dict, in place."""

    def __init__(self, random: random.Random) -> None:
        self.random = random

    def __call__(self, state_dict: dict[str, Any]) -> None:
        kinds = [self.value, self.value, self.key, self.swap, self.hyper, self.hyper, self.group, self.whole]
        self.random.choice(kinds)(state_dict)

    def mapping(self, state_dict: dict[str, Any]) -> dict[Any, Any]:
        """The state of a parameter, or what is nested in it."""
        states = [state for state in state_dict["state"].values() if isinstance(state, dict)]
        nested = [value for state in states for value in state.values() if isinstance(value, dict)]
        return self.random.choice([*states, *nested, {}])

    def junk(self) -> Any:
        return self.random.choice(JUNK)

    def value(self, state_dict: dict[str, Any]) -> None:
        state = self.mapping(state_dict)
        name = self.random.choice([*state, "exp_avg"])
        if isinstance(state.get(name), Tensor) and state[name] is not FREED and self.random.random() < 0.7:
            try:
                state[name] = self.random.choice(TENSOR_DAMAGES)(state[name])
            except (RuntimeError, TypeError, NotImplementedError):  # what a second damage cannot do to the first
                state[name] = self.junk()
        else:
            state[name] = self.junk()

    def key(self, state_dict: dict[str, Any]) -> None:
        state = self.mapping(state_dict)
        name = self.random.choice([*state, "step"])
        value = state.pop(name, None)
        if self.random.random() < 0.5:
            names: tuple[Any, ...] = ("exp_avg", "exp_avg_codes", "exp_avg_scale", "exp_avg_absmax", "exp_avg_sq_scale")
            names += ("sum", "sum_codes", "step", "compensation", "state1", "absmax9", 3, None, ("a",))
            state[self.random.choice(names)] = value

    def swap(self, state_dict: dict[str, Any]) -> None:
        ours, theirs = self.mapping(state_dict), self.mapping(state_dict)
        if ours and theirs:
            a, b = self.random.choice([*ours]), self.random.choice([*theirs])
            ours[a], theirs[b] = theirs[b], ours[a]

    def hyper(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
        group = self.random.choice([*groups, {}])
        name = self.random.choice([*group, "extra", "param_names"])
        if self.random.random() < 0.2:
            group.pop(name, None)
        else:
            group[name] = self.junk()

    def group(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if not isinstance(groups, list) or not groups:
            return
        number = self.random.randrange(len(groups))
        changes: tuple[Callable[[], Any], ...] = (
            lambda: groups.pop(number),
            lambda: groups.append(groups[number]),
            groups.reverse,
            lambda: groups.__setitem__(number, self.junk()),
            lambda: groups[number].update(params=[self.random.choice((0, 1, 2, "a", None, [0], 1.5))]),
            lambda: groups[number].update(params=[0, 1]),
        )
        try:
            self.random.choice(changes)()
        except (AttributeError, TypeError):  # a group that another damage has made into something else
            groups.clear()

    def whole(self, state_dict: dict[str, Any]) -> None:
        section = self.random.choice(("state", "param_groups"))
        states = state_dict["state"]
        changes: tuple[Callable[[], Any], ...] = (
            lambda: state_dict.update({section: self.junk()}),
            lambda: states.update({self.random.choice((0, 1, 2, -1, "0", None)): self.junk()}),
            lambda: states.update({self.random.choice((2, -1, "0", None)): {}}),
            lambda: states.pop(self.random.choice([*states])),
            lambda: state_dict.update(extra=self.junk()),
        )
        self.random.choice(changes)()


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def contents(optimizer: Optimizer8bit) -> list[Any]:
    """Everything that loading could change."""
    groups = [dict(group) for group in optimizer.param_groups]
    return [groups, [dict(optimizer.state[p]) if p in optimizer.state else None for g in groups for p in g["params"]]]


def hypers(optimizer: Optimizer8bit) -> list[dict[str, Any]]:
    return [{name: group[name] for name in optimizer.defaults} for group in optimizer.param_groups]


def assert_right(optimizer: Optimizer8bit, usual: list[dict[str, Any]]) -> None:
    """What was loaded belongs to its parameters, and a step goes well wherever there were numbers.

    Args:
        usual: hyper-parameters that suit; torch.optim takes others, as an ``alpha`` of 5, by which states explode.
    """
    finite = {}
    for group, hyper, suiting in zip(optimizer.param_groups, hypers(optimizer), usual, strict=True):
        rule = optimizer.rule(group)
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if not NOT_OTHERS & set(state):
                state = {}  # of others only, such as slow weights: ours begin anew
            if state:
                check("a parameter", param, rule, group, state)
                assert float(state["step"]) >= 0
            finite[param] = torch.full_like(param, hyper == suiting, dtype=torch.bool)
            for name in rule.states if state else ():  # 3e38 has no square
                scale = state.get(f"{name}_scale")
                finite[param] &= state[name].abs() < 1e18 if scale is None else bool((scale.abs() < 1e18).all())
            if state and COMPENSATION in state:  # nothing is rounded to 0: bits beyond it are those of NaN
                finite[param] &= param != 0
    step(optimizer)
    for param, mask in finite.items():
        assert param[mask].isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # a damage to a damage
@pytest.mark.parametrize("name", CASES)
def test_damaged_state_dicts_are_refused_or_loaded_right(name: str) -> None:
    case, seeded = CASES[name], random.Random(name)
    damage = Damage(seeded)
    pristine = case.made(parameters(case.dtype))
    outcomes = {"refused": 0, "loaded": 0}
    params = parameters(case.dtype)
    optimizer = make(case.ours, params, case.hyper)
    values = [param.detach().clone() for param in params]
    for _ in range(-(-COUNT // len(CASES))):
        with torch.no_grad():
            for param, value in zip(params, values, strict=True):
                param.copy_(value)
        optimizer.load_state_dict(pristine)
        usual, before = hypers(optimizer), copy.deepcopy(contents(optimizer))
        damaged = copied(pristine)
        for _ in range(seeded.choice((1, 1, 1, 2, 3))):
            damage(damaged)
            if not isinstance(damaged["state"], dict):
                break
        try:
            optimizer.load_state_dict(damaged)
        except (TypeError, ValueError) as error:
            assert str(error)
            outcomes["refused"] += 1
            assert is_same(contents(optimizer), before)
            assert all(map(torch.equal, params, values))
        else:
            outcomes["loaded"] += 1
            assert_right(optimizer, usual)
    assert min(outcomes.values()) > COUNT / len(CASES) / 10  # neither everything nor nothing


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Containers anew; no damage writes into a tensor."""
    if isinstance(state_dict, dict):
        return {key: copied(value) for key, value in state_dict.items()}
    return [copied(value) for value in state_dict] if isinstance(state_dict, list) else state_dict
