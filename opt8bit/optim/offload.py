"""Parameters that are stepped on the CPU, wherever they are: their states never leave it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from opt8bit.optim import shards

BACKWARD = "backward"  # the option's value for steps that are taken while the backward pass goes on


class Host:
    """Holds room on the CPU for a parameter, or its shard on this process, and its gradient."""

    def __init__(self, param: Tensor, grad: Tensor) -> None:
        self._device = param.device
        self._is_apart = param.device.type != "cpu"
        self.param, self.grad = (
            torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=self._is_apart) for like in (param, grad)
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


class Hosts:
    """Keeps the hosts of an optimizer's parameters."""

    def __init__(self) -> None:
        self._hosts: dict[Tensor, Host] = {}

    def fetched(self, param: Tensor) -> Host:
        """Returns the host of a parameter, to which it and its gradient are on the way.

        Raises:
            RuntimeError: the gradient is none that it can have.
        """
        shards.check_grad(param)
        assert param.grad is not None
        local, grad = shards.local(param), shards.local_grad(param.grad, param)
        host = self._hosts.get(param)
        if host is None or not host.fits(local, grad):
            host = self._hosts[param] = Host(local, grad)
        host.fetch(local, grad)
        return host

    def of(self, param: Tensor) -> Host:
        """Returns the host of a parameter that has been fetched."""
        return self._hosts[param]

    def give_back(self, param: Tensor) -> None:
        self._hosts[param].give_back(shards.local(param))

    def keep(self, params: Collection[Tensor]) -> None:
        """Lets go of the hosts of all others."""
        for gone in [param for param in self._hosts if param not in params]:
            del self._hosts[gone]


def target(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Returns a tensor with the shape, dtype and device of a parameter's states on this process.

    Its shape is that of the shard, and its device that of the step. Its values mean nothing.
    """
    local = shards.local(param)
    return on_cpu(local) if group["offload"] else local


def on_cpu(tensor: Tensor) -> Tensor:
    """Returns a tensor of that shape and dtype on the CPU, that takes no memory."""
    return torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
