"""Parameters that are stepped on the CPU, wherever they are: their states never leave it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.optim import shards

BACKWARD = "backward"  # the option's value for steps that are taken while the backward pass goes on


CHANGED = (
    f"offload={BACKWARD!r} has stepped with a gradient that was changed afterwards: accumulated, clipped, unscaled, or "
    "averaged over processes by DDP; use offload=True"
)


class Host:
    """Room on the CPU for a parameter, or its shard on this process, and its gradient."""

    def __init__(self, param: Tensor, grad: Tensor) -> None:
        self._device = param.device
        self._is_apart = param.device.type != "cpu"
        self.param, self.grad = (
            torch.empty(like.shape, dtype=like.dtype, pin_memory=self._is_apart) for like in (param, grad)
        )
        if self._is_apart:
            self._module = torch.get_device_module(self._device)
            self._stream = self._module.Stream(self._device)
            self._arrived, self._given = self._module.Event(), self._module.Event()

    def fits(self, param: Tensor, grad: Tensor) -> bool:
        mine = (self.param.shape, self.param.dtype, self.grad.dtype, self._device)
        return (param.shape, param.dtype, grad.dtype, param.device) == mine

    @torch.no_grad()
    def fetch(self, param: Tensor, grad: Tensor) -> None:
        """Starts to copy both here, when the device is done with what it was told so far; :meth:`wait` before use."""
        if not self._is_apart:
            self.param.copy_(param)
            self.grad.copy_(grad)
            return
        self._stream.wait_stream(self._module.current_stream(self._device))
        self._stream.wait_event(self._given)  # what was given back last has left
        with self._module.stream(self._stream):
            self.param.copy_(param, non_blocking=True)
            self.grad.copy_(grad, non_blocking=True)
            self._arrived.record(self._stream)
        for tensor in (param, grad):
            tensor.record_stream(self._stream)  # type: ignore[arg-type]

    def wait(self) -> None:
        if self._is_apart:
            self._arrived.synchronize()

    @torch.no_grad()
    def give_back(self, param: Tensor) -> None:
        """Copies the stepped parameter to where it came from, on the current stream."""
        param.copy_(self.param, non_blocking=True)
        if self._is_apart:
            self._given.record(self._module.current_stream(self._device))


class Begun(NamedTuple):
    """A step beside the backward pass, and the gradient that it is taken with."""

    step: Future[None]
    grad: weakref.ref[Tensor]  # so that it may be let go at once
    version: int


class Hosts:
    """Those of an optimizer's parameters, and the steps that the backward pass has begun."""

    def __init__(self) -> None:
        self._hosts: dict[Tensor, Host] = {}
        self._begun: dict[Tensor, Begun] = {}
        self._pool: ThreadPoolExecutor | None = None

    def fetched(self, param: Tensor) -> Host:
        """The host of a parameter, to which it and its gradient are on the way."""
        assert param.grad is not None
        local, grad = shards.local(param), shards.local_grad(param.grad, param)
        host = self._hosts.get(param)
        if host is None or not host.fits(local, grad):
            host = self._hosts[param] = Host(local, grad)
        host.fetch(local, grad)
        return host

    def of(self, param: Tensor) -> Host:
        """The host of a parameter that has been fetched."""
        return self._hosts[param]

    def fetch_alone(self, param: Tensor) -> None:
        """Fetches a parameter whose step is about to :meth:`begin`.

        Raises:
            RuntimeError: one has begun already, and the parameter has not been given back since.
        """
        if param in self._begun:
            raise RuntimeError(
                f"offload={BACKWARD!r} takes one backward pass for each step, but a parameter of shape "
                f"{tuple(param.shape)} has got a second gradient: call step() after each, or use offload=True"
            )
        self.fetched(param)

    def begin(self, param: Tensor, step: Callable[[], None]) -> None:
        """Has a parameter that is on its way here stepped by a thread beside the backward pass."""
        host, grad = self._hosts[param], param.grad
        assert grad is not None

        def wait_and_step() -> None:
            host.wait()
            step()

        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "opt8bit-offload")
        self._begun[param] = Begun(self._pool.submit(wait_and_step), weakref.ref(grad), grad._version)

    def wait(self) -> None:
        """Until no step goes on; what it may raise is left to :meth:`finish`."""
        if self._begun:
            wait(begun.step for begun in self._begun.values())

    def drop(self) -> None:
        """Forgets the steps that were begun: their parameters stay as they are."""
        self.wait()
        self._begun = {}

    def finish(self) -> set[Tensor]:
        """Waits for the steps that were begun, and names their parameters.

        Raises:
            RuntimeError: a gradient has been changed since.
            Exception: whatever a step has raised.
        """
        begun = self._begun
        self.drop()
        for param, (step, grad, version) in begun.items():
            error = step.exception()
            if error is not None:
                raise error
            if param.grad is not None and (param.grad is not grad() or param.grad._version != version):
                raise RuntimeError(CHANGED)
        return set(begun)

    def give_back(self, param: Tensor) -> None:
        self._hosts[param].give_back(shards.local(param))

    def keep(self, params: Collection[Tensor]) -> None:
        """Lets go of the hosts of all others."""
        for gone in [param for param in self._hosts if param not in params]:
            del self._hosts[gone]


def target(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """What the states of a parameter in a group are like on this process: of the shape of its shard, and where that is
    stepped. Only its shape, dtype and device are to be looked at."""
    local = shards.local(param)
    return on_cpu(local) if group["offload"] else local


def on_cpu(tensor: Tensor) -> Tensor:
    """A tensor of that shape and dtype on the CPU, that takes no memory."""
    return torch.empty((), dtype=tensor.dtype).expand(tensor.shape)


def call_when_accumulated(param: Tensor, method: Callable[[Tensor], None]) -> None:
    """Has a bound method called whenever a backward pass has accumulated a parameter's gradient, as long as its object
    lives."""
    reference = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(param)

    if param.requires_grad and param.is_leaf:
        param.register_post_accumulate_grad_hook(hook)
