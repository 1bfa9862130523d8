"""Parameters that are stepped on the CPU, wherever they are: their states never leave it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from opt8bit.optim import shards

BACKWARD = "backward"  # the option's value for steps that are taken while the backward pass goes on


class Host:
    """Room on the CPU for a parameter, or its shard on this process, and its gradient."""

    def __init__(self, param: Tensor) -> None:
        self._device = param.device
        self.param, self.grad = (
            torch.empty(param.shape, dtype=param.dtype, pin_memory=self._is_apart, requires_grad=False)
            for _ in range(2)
        )
        if self._is_apart:
            module = torch.get_device_module(self._device)
            self._stream, self._arrived, self._in = module.Stream(self._device), module.Event(), module.stream
            self._current = module.current_stream

    @property
    def _is_apart(self) -> bool:
        return self._device.type != "cpu"

    def fits(self, param: Tensor) -> bool:
        return (param.shape, param.dtype, param.device) == (self.param.shape, self.param.dtype, self._device)

    def fetch(self, param: Tensor, grad: Tensor) -> None:
        """Starts to copy both here, when the device is done with what it was told so far; :meth:`wait` before use."""
        if not self._is_apart:
            self.param.copy_(param)
            self.grad.copy_(grad)
            return
        self._stream.wait_stream(self._current(self._device))
        with self._in(self._stream):
            self.param.copy_(param, non_blocking=True)
            self.grad.copy_(grad, non_blocking=True)
            self._arrived.record(self._stream)
        for tensor in (param, grad):
            tensor.record_stream(self._stream)  # type: ignore[arg-type]

    def wait(self) -> None:
        if self._is_apart:
            self._arrived.synchronize()

    def give_back(self, param: Tensor) -> None:
        """Copies the stepped parameter to where it came from, on the current stream."""
        param.copy_(self.param, non_blocking=True)


class Hosts:
    """Those of an optimizer's parameters, and the steps that the backward pass has begun."""

    def __init__(self) -> None:
        self._hosts: dict[Tensor, Host] = {}
        self._begun: dict[Tensor, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def fetched(self, param: Tensor) -> Host:
        """The host of a parameter, to which it and its gradient are on the way."""
        assert param.grad is not None
        local = shards.local(param)
        host = self._hosts.get(param)
        if host is None or not host.fits(local):
            host = self._hosts[param] = Host(local)
        host.fetch(local, shards.local_grad(param.grad, param))
        return host

    def of(self, param: Tensor) -> Host:
        """The host of a parameter that has been fetched."""
        return self._hosts[param]

    def begin(self, param: Tensor, step: Callable[[], None]) -> None:
        """Has a parameter stepped by a thread beside the backward pass.

        Raises:
            RuntimeError: it has been already, and the parameter has not been given back since.
        """
        if param in self._begun:
            raise RuntimeError(
                f"offload={BACKWARD!r} takes one backward pass for each step, but a parameter of shape "
                f"{tuple(param.shape)} has got a second gradient: use offload=True to accumulate gradients"
            )
        host = self.fetched(param)

        def wait_and_step() -> None:
            host.wait()
            step()

        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "opt8bit-offload")
        self._begun[param] = self._pool.submit(wait_and_step)

    def finish(self) -> set[Tensor]:
        """Waits for the steps that were begun, and names their parameters.

        Raises:
            Exception: whatever a step has raised.
        """
        begun, self._begun = self._begun, {}
        errors = [future.exception() for future in begun.values()]
        for error in filter(None, errors):
            raise error
        return set(begun)

    def give_back(self, param: Tensor) -> None:
        self._hosts[param].give_back(shards.local(param))


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
