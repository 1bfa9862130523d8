"""The float model's loss, differentiated with respect to what its linear layers put out for each token, and squared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from opt8bit.backends.processor import has_amx
from opt8bit.ptq.model.blocks import linear_layers
from opt8bit.ptq.model.memory import return_freed
from opt8bit.ptq.model.passes import Call, raised_by
from opt8bit.ptq.model.source import Loaded, Source
from opt8bit.ptq.model.usage import watched

# A compression holds about so many copies of all tokens' hidden states. As much may be held here, before it.
HELD = 12

Losses = Callable[[Tensor], Iterator[Tensor]]  # of what comes out of the last block: parts of the loss, ()


def squared_gradients(
    source: Source,
    names: Sequence[str],
    calls: Sequence[Sequence[Call]],
    embedded: Sequence[Tensor],
    losses: Sequence[Losses],
) -> dict[str, list[Tensor]]:
    """Runs the float model forward and backward, block by block. No gradient of a weight is computed.

    Each block runs again for its backward pass, on the hidden states that went into it, which are kept. So the graph of
    only one block and one batch is in memory. Batches go through a model in memory one after another. Where blocks are
    read from files, as many go together as memory allows, so that blocks are read less often. Products of a float32
    model are computed in bfloat16 on processors that multiply tiles of it.

    Args:
        source: of the model.
        names: of its blocks.
        calls: of each batch, how the model calls each block, without hidden states.
        embedded: of each batch, (sequences, length, ...), the hidden states that go into the first block.
        losses: of each batch that is learned from; there may be calls of others behind them.

    Returns:
        Of each layer, by its full name, and each batch, (sequences, length): the squares, summed over the layer's
        outputs. Layers that do not see all tokens of every batch in one call are left out.

    Raises:
        ModelError: the model's code raised an exception, or cannot be differentiated.
    """
    at_once = 1 if isinstance(source, Loaded) else max(1, HELD * len(losses) // len(names))
    squares: list[dict[str, Tensor]] = []  # of each batch
    with _frozen(source.model), _fast_products(embedded[0]):
        for start in range(0, len(losses), at_once):
            own = (each[start : start + at_once] for each in (calls, embedded, losses))
            squares += _there_and_back(source, names, [_Pass(*parts) for parts in zip(*own, strict=False)])
            return_freed()  # not after each block: its memory would be faulted in again
    complete = [name for name in squares[0] if all(name in of_batch for of_batch in squares)]
    return {name: [of_batch[name] for of_batch in squares] for name in complete}


def _there_and_back(source: Source, names: Sequence[str], passes: Sequence[_Pass]) -> list[dict[str, Tensor]]:
    """Takes batches through all blocks and back; returns what each has found."""
    for name in names[:-1]:
        with source.block(name) as block:
            for each in passes:
                each.forward(name, block)
    for name in reversed(names):
        with source.block(name) as block:
            for each in passes:
                each.backward(name, block)
    return [each.squares for each in passes]


class _Pass:
    """The way of one batch through the blocks, and back.

    Args:
        calls: of the blocks.
        hidden: what goes into the first one.
        losses: of what comes out of the last one.

    Attributes:
        squares: of each layer that has been passed on the way back.
    """

    def __init__(self, calls: Sequence[Call], hidden: Tensor, losses: Losses) -> None:
        self.squares: dict[str, Tensor] = {}
        self._calls, self._losses = calls, losses
        self._inputs = [hidden]  # of the blocks up to the one that is next
        self._gradient: Tensor | None = None  # with respect to what comes out of the block that is next on the way back

    def forward(self, name: str, block: nn.Module) -> None:
        """Goes through the next block, which is not the last one."""
        self._inputs.append(self._call(name, self._inputs[-1]).of(block))

    def backward(self, name: str, block: nn.Module) -> None:
        """Goes back through a block, the last one first."""
        hidden = self._inputs[-1].detach().requires_grad_()
        with torch.enable_grad():
            with watched(linear_layers(block), partial(self._watch, name, hidden.shape[:2])):
                output = self._call(name, hidden).of(block)
            with raised_by(f"loss_weighting: the backward pass of the model's block {name}"):
                if self._gradient is None:
                    self._gradient = self._of_losses(output.detach())
                (self._gradient,) = torch.autograd.grad(output, hidden, self._gradient)
        self._inputs.pop()

    def _call(self, name: str, hidden: Tensor) -> Call:
        """Returns how the model calls the block that is next."""
        return self._calls[len(self._inputs) - 1]._replace(hidden=hidden, name=name)

    def _of_losses(self, hidden: Tensor) -> Tensor:
        """Returns the gradient of the loss with respect to what comes out of the last block."""
        hidden.requires_grad_()
        for loss in self._losses(hidden):
            loss.backward()
        return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad

    def _watch(self, block: str, tokens: torch.Size, layer: str, x: Any, output: Any) -> None:
        """Has the squares taken when the gradient with respect to a layer's output is there."""

        def take(gradient: Tensor) -> None:
            if gradient.shape[:-1].numel() == tokens.numel():
                wide = torch.promote_types(gradient.dtype, torch.float32)
                norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=wide)
                self.squares[f"{block}.{layer}"] = norms.square().reshape(tokens)

        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(take)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Keeps the parameters of a model without gradients, inside the context."""
    learned = [param for param in model.parameters() if param.requires_grad]
    for param in learned:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in learned:
            param.requires_grad_(True)


class _NarrowProducts(TorchFunctionMode):
    """Has ``nn.functional.linear``, and so ``nn.Linear``, compute products of float32 in bfloat16.

    Everything else is computed as ever. Under torch's own autocast, layers would put out bfloat16, which some models
    cannot add to their float32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and all(each is None or each.dtype == torch.float32 for each in args):
            return func(*(each if each is None else each.bfloat16() for each in args)).float()
        return func(*args, **(kwargs or {}))


def _fast_products(hidden: Tensor) -> AbstractContextManager[object]:
    """Computes products in bfloat16 where that is far faster, inside the context: weights of tokens need few digits."""
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and has_amx():
        return _NarrowProducts()
    return nullcontext()
