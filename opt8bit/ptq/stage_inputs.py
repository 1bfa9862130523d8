"""Collects what a stage's layers see of each batch, from passes that stand before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from opt8bit.ptq.calibration.statistics import Inputs
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.model.walk import Walk


class StageInputs(Sequence[Inputs]):
    """Lists the inputs of each batch. The wanted output is computed when a batch is asked for, and not kept.

    A writer's output that is as precise as what it should put out is handed to the float model's pass.

    Args:
        passes: of each batch, through the float block and the compressed one; both stand before the same layer.
        shapes: (sequences, length) of each batch: some models put all tokens of a batch into one dimension on the way.
        masks: of each batch.
        weights: of each batch's tokens, (sequences, length); None where all that count weigh 1.
        writer: the float model's layer, if its output is added to the hidden states.
        drifts: of each batch, by how much the hidden states have drifted, (sequences, length, h); if there is a writer.
    """

    def __init__(
        self,
        passes: Sequence[tuple[Walk, Walk]],
        shapes: Sequence[torch.Size],
        masks: Sequence[Tensor | None],
        weights: Sequence[Tensor] | None = None,
        writer: nn.Module | None = None,
        drifts: Sequence[Tensor] = (),
    ) -> None:
        self._passes, self._shapes, self._masks, self._weights = passes, shapes, masks, weights
        self._writer, self._drifts = writer, drifts
        self._outputs: list[Tensor] = []
        self._wanted_dtype = torch.promote_types(self.dtype, torch.float32)
        if writer is not None and self.dtype == self._wanted_dtype:
            for walk, _ in passes:
                self._outputs.append(writer(walk.x))
                walk.answer(self._outputs[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return self._passes[0][1].x.dtype

    def __len__(self) -> int:
        return len(self._passes)

    @overload
    def __getitem__(self, i: int) -> Inputs: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Inputs]: ...
    def __getitem__(self, i: int | slice) -> Inputs | Sequence[Inputs]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        x, x_hat = (walk.x for walk in self._passes[i])
        shape = (*self._shapes[i], x.shape[-1])
        wanted = None if self._writer is None else self._wanted(i, self._writer, x)
        weights = None if self._weights is None else self._weights[i]
        return Inputs(x.reshape(shape), x_hat.reshape(shape), self._masks[i], wanted, weights)

    def _wanted(self, i: int, writer: nn.Module, x: Tensor) -> Tensor:
        """Returns what the writer should put out of batch i, except its bias, where the float model's sees x."""
        if self._outputs:
            y = self._outputs[i]
            bias: Tensor | None = writer.bias  # type: ignore[assignment]
            y = y if bias is None else y - bias
        else:  # what its output loses when it is rounded, with its bias, is not for the weights to imitate
            y = linear(x.to(self._wanted_dtype), matrix(writer).to(self._wanted_dtype))
        return y.reshape(self._drifts[i].shape) + self._drifts[i]
