"""Records what is known of an update rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

MAX_STATES = 4  # kMaxStates of kernels/optimizer_step.h


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule.

    Attributes:
        name: which its kernels share, if it has some: a functor in ``kernels/rules``, a function in
            ``backends/triton/rules``.
        states: by torch.optim's names, in the order of ``update``: whether each can be negative.
        hyper: keywords of ``update`` besides ``step``, in the order in which the kernels declare them.
        update: the pure function that defines it: (param, grad, *states, step=, **hyper) -> (param, *states).
        family: name of the file that has its kernels, which rules of one optimizer share; its own name if left out.
        iterates: states that are points as the parameter is: they begin where it is, and are always stored in full.
        whole: whether it looks at a whole parameter, not at one element after another.
        parts: ``update`` as three functions, where the second is faster for several parameters of one shape at once:
            (grad, *states, **hyper) -> (x, *states), which may overwrite the states; (x, or several of them stacked,
            **hyper) -> as many; (param, x, **hyper) -> param.
        caution: whether it leaves out elements that it would move against their gradients.
        dim: how many dimensions a parameter must have; None for any number.
        torch_counts_steps: whether its counterpart in torch.optim keeps ``step``.
        bitsandbytes: what ``state1`` and ``state2`` hold there, stacked where it is several; empty where there are no
            such states.
        bitsandbytes_hyper: hyper-parameters that bitsandbytes names otherwise, or not at all, each computed from a
            parameter group of its.

    Raises:
        ValueError: there are more states than a step has room for.
    """

    name: str
    states: Mapping[str, bool]
    hyper: tuple[str, ...]
    update: Callable[..., tuple[Tensor, ...]]
    family: str = ""
    iterates: tuple[str, ...] = ()
    whole: bool = False
    parts: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor], Callable[..., Tensor]] | None = None
    caution: bool = False
    dim: int | None = None
    torch_counts_steps: bool = True
    bitsandbytes: tuple[tuple[str, ...], ...] = ()
    bitsandbytes_hyper: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.name)
        if len(self.states) > MAX_STATES:
            raise ValueError(f"rule {self.name!r} must have at most {MAX_STATES} states, got {len(self.states)}")

    @property
    def codable(self) -> dict[str, bool]:
        """The states that may be stored in 8 bits."""
        return {name: signed for name, signed in self.states.items() if name not in self.iterates}


def check_alike(rule: Rule, what: str, found: object, where: str) -> None:
    """Checks a rule against its kernel.

    Raises:
        TypeError: they differ.
    """
    mine: object = tuple(rule.states.values()) if what == "signs" else getattr(rule, what)
    if mine != found:
        raise TypeError(f"rule {rule.name!r} has {what} {mine}, but {where} of that name has {found}")
