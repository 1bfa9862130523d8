"""Models that run as a whole, whether their weights are in memory or are read, block by block, when they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.model.memory import bytes_of, machine_memory
from opt8bit.ptq.model.skeleton import get_tensor, parameters_and_buffers, set_tensor
from opt8bit.ptq.model.source import Checkpoint, Source, give_back_memory
from opt8bit.ptq.model.walk import halting_behind, walks

KEPT = 2  # blocks, at least: where passes go side by side, some have left a block while others are still in it
SHARE = 1 / 4  # of the machine's memory, that blocks which stay may take


class Running:
    """A model that can be called. Its weights are in memory.

    Args:
        model: any.

    Attributes:
        model: the same.
        blocks: between which passes side by side halt, so that each block is read once; none if there is no need.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: Sequence[nn.Module] = ()

    def need(self, name: str) -> None:
        """Sees to it that the weights of a module are in memory, until those of two other blocks are needed."""

    def hold(self, name: str) -> None:
        """Sees to it that the weights of a module's block stay in memory: they may be changed then."""

    def outputs(
        self, calls: Sequence[Callable[[nn.Module], Any]], turn: Callable[[int], None] | None = None
    ) -> Iterator[Any]:
        """Makes calls of the model; yields what each returns, in their order.

        Where blocks are read when they are needed, all calls go from block to block side by side. What they need to go
        on with is in memory together then; of their results there is one at a time.

        Args:
            calls: each calls the model that it gets.
            turn: is told which of them goes on now.

        Raises:
            ImportError: calls go side by side, and greenlet is not installed.
        """
        tell = turn or (lambda i: None)
        if not self.blocks:
            for i, each in enumerate(calls):
                tell(i)
                yield each(self.model)
            return
        with halting_behind(self.blocks), walks(lambda each=each: each(self.model) for each in calls) as passes:
            first = 0  # whose result has not been handed over
            while first < len(passes):
                for i, walk in enumerate(passes):
                    if not walk.ended:
                        tell(i)
                        walk.step()
                    while first < len(passes) and passes[first].ended:
                        yield passes[first].taken()
                        first += 1


class OnDemand(Running):
    """A checkpoint's model whose blocks' matrices are read when a module of the block is called.

    They are let go when so many others have been called since that a quarter of the machine's memory does not hold them
    all. Vectors stay, so that biases can be changed.

    Args:
        source: the checkpoint. Its own model stays as it is, and shares what is outside of the blocks.
        kept: how many blocks are in memory at most; by default as many as there is room for.
    """

    def __init__(self, source: Checkpoint, kept: int | None = None) -> None:
        shared = {id(tensor): tensor for tensor in parameters_and_buffers(source.model).values()}
        super().__init__(copy.deepcopy(source.model, shared))
        prefix, blocks = find_blocks(self.model)
        room = max(KEPT, int(min(len(blocks), SHARE * machine_memory() / max(map(bytes_of, blocks)))))
        self._kept = room if kept is None else kept
        self.blocks = list(blocks) if self._kept < len(blocks) else []
        self._source = source
        self._matrices: dict[str, list[str]] = {f"{prefix}.{i}": [] for i in range(len(blocks))}
        self._there: list[str] = []  # names of blocks, the one that was needed last at the end
        self._held: set[str] = set()
        vectors = []
        for name, tensor in parameters_and_buffers(self.model).items():
            block = self._block_of(name)
            if block is not None:
                names = self._matrices[block] if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 else vectors
                names.append(name)
        source.load(self.model, vectors)
        for name in self._matrices:
            for module in self.model.get_submodule(name).modules():
                module.register_forward_pre_hook(self._needing(name))

    def need(self, name: str) -> None:
        block = self._block_of(name)
        if block is not None:
            self._bring(block)

    def hold(self, name: str) -> None:
        block = self._block_of(name)
        if block is not None and block not in self._held:
            self._bring(block)
            self._there.remove(block)
            self._held.add(block)

    def _bring(self, block: str) -> None:
        if block in self._held:
            return
        if block in self._there:
            self._there.remove(block)
        else:
            self._source.load(self.model, self._matrices[block])
        self._there.append(block)
        while len(self._there) > self._kept:
            self._let_go(self._there.pop(0))

    def _needing(self, block: str) -> Callable[..., None]:
        # A function, as whoever copies the block copies the objects that are hooks, and all that these refer to.
        return lambda module, args: self._bring(block)

    def _let_go(self, block: str) -> None:
        for name in self._matrices[block]:
            set_tensor(self.model, name, torch.empty_like(get_tensor(self.model, name), device="meta"))
        give_back_memory()

    def _block_of(self, name: str) -> str | None:
        return next((block for block in self._matrices if f"{name}.".startswith(f"{block}.")), None)


def running(model: nn.Module | Source | Running) -> Running:
    """Returns a model so that it runs: one in memory, or a checkpoint's, whose blocks are read when they are needed."""
    if isinstance(model, Running):
        return model
    if isinstance(model, Checkpoint):
        return OnDemand(model)
    return Running(model.model if isinstance(model, Source) else model)
