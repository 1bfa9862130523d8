"""``offload="backward"``: parameters are stepped by a thread while the backward pass goes on to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.backends import backend_for
from opt8bit.optim.offload import BACKWARD, Hosts

CHANGED = (
    f"offload={BACKWARD!r} has stepped with a gradient that was changed afterwards: accumulated, clipped, unscaled, or "
    "averaged over processes by DDP; use offload=True"
)
Groups = list[dict[str, Any]]
Preparer = Callable[[int, int], Callable[[], None]]  # (group, parameter in it) -> its step, for a thread to take


class Begun(NamedTuple):
    """A step beside the backward pass, and the gradient that it is taken with."""

    step: Future[None]
    grad: weakref.ref[Tensor]  # so that it may be let go at once
    version: int


class Backward:
    """The steps of an optimizer that the backward pass has begun.

    Args:
        groups: of the optimizer's parameters, as they are when it is called.
        hosts: of its parameters.
        prepare: makes the step of a parameter that is on its way to its host.
    """

    def __init__(self, groups: Callable[[], Groups], hosts: Hosts, prepare: Preparer) -> None:
        self._groups, self._hosts = groups, hosts
        self._prepare = prepare
        self._watched: set[Tensor] = set()
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._begun: dict[Tensor, Begun] = {}
        self._pool: ThreadPoolExecutor | None = None

    def watch(self) -> None:
        """Registers hooks that start a parameter's step as soon as its gradient is there."""
        groups = [group for group in self._groups() if group["offload"] == BACKWARD]
        if groups:
            backend_for("cpu")  # warns of missing kernels here, as no line of the user runs in the thread
        for param in [param for group in groups for param in group["params"] if param not in self._watched]:
            if param.requires_grad and param.is_leaf:  # others may become so
                self._watched.add(param)
                call_when_accumulated(param, self._begin)

    def wait(self) -> None:
        """Waits until no step is running; :meth:`finish` raises what they may raise."""
        if self._begun:
            wait(begun.step for begun in self._begun.values())

    def drop(self) -> None:
        """Forgets the steps that were begun: their parameters stay as they are."""
        self.wait()
        self._begun = {}

    def finish(self, is_scaled: bool) -> set[Tensor]:
        """Waits for the steps that were begun, gives their parameters back, and names them.

        Args:
            is_scaled: whether GradScaler has a say in the step.

        Raises:
            RuntimeError: it has, and it came too late; or a gradient has been changed since.
            Exception: whatever a step has raised.
        """
        done = self._begun
        self.drop()
        for param, (step, grad, version) in done.items():
            error = step.exception()
            if error is not None:
                raise error
            if param.grad is not None and (param.grad is not grad() or param.grad._version != version):
                raise RuntimeError(CHANGED)
        if done and is_scaled:
            raise RuntimeError(f"offload={BACKWARD!r} has stepped before GradScaler could unscale: use offload=True")
        for param in done:
            self._hosts.give_back(param)
        return set(done)

    def _begin(self, param: Tensor) -> None:
        """Starts the step of a parameter whose gradient has just been accumulated."""
        place = self._place(param)
        if place is None or self._groups()[place[0]]["offload"] != BACKWARD:
            return
        if param in self._begun:
            raise RuntimeError(
                f"offload={BACKWARD!r} takes one backward pass for each step, but a parameter of shape "
                f"{tuple(param.shape)} has got a second gradient: call step() after each, or use offload=True"
            )
        host = self._hosts.fetched(param)
        with torch.no_grad():
            step = self._prepare(*place)

        @torch.no_grad()
        def wait_and_step() -> None:
            host.wait()
            step()

        grad = param.grad
        assert grad is not None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "opt8bit-offload")
        self._begun[param] = Begun(self._pool.submit(wait_and_step), weakref.ref(grad), grad._version)

    def _place(self, param: Tensor) -> tuple[int, int] | None:
        """Returns the numbers of a parameter's group, and of the parameter in it, or None if it is in none any more."""
        if self._at(self._places.get(param)) is not param:
            groups = enumerate(self._groups())
            self._places = {p: (i, j) for i, group in groups for j, p in enumerate(group["params"])}
        return self._places.get(param)

    def _at(self, place: tuple[int, int] | None) -> Tensor | None:
        """Returns the parameter of these numbers, if there is one."""
        groups = self._groups()
        if place is None or place[0] >= len(groups):
            return None
        params = groups[place[0]]["params"]
        return params[place[1]] if place[1] < len(params) else None


def call_when_accumulated(param: Tensor, method: MethodType) -> None:
    """Calls a bound method whenever a parameter's gradient has been accumulated, as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(param)

    handle = param.register_post_accumulate_grad_hook(hook)
    weakref.finalize(method.__self__, handle.remove).atexit = False
