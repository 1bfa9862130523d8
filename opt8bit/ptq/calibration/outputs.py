"""Measures how far the outputs of compressed layers are from the float model's, while passes go through both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq import ranks


class OutputErrors:
    """Sums squares over the tokens of all batches, by layer.

    For every batch the float model's pass goes through its layers, then the compressed model's through the layers of
    the same names, then :meth:`compare` takes what both put out.

    Args:
        layers: of the float model.
        layers_hat: of the compressed model.
        shifts: what Bias Compensation added to each of those, (out,) or (length, out), if anything.
        overwritten: names of the layers whose output others change in place.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        layers_hat: Mapping[str, nn.Module],
        shifts: Mapping[str, Tensor | None],
        overwritten: Collection[str] = (),
    ) -> None:
        self._shifts = shifts
        self._outputs: dict[str, Tensor] = {}
        self._outputs_hat: dict[str, Tensor] = {}
        self._signal = dict.fromkeys(layers, 0.0)
        self._rounded = dict.fromkeys(layers, 0.0)
        self._corrected = dict.fromkeys(layers, 0.0)
        self._hooks = [
            modules[name].register_forward_hook(_keep(outputs, name, copy=name in overwritten))
            for modules, outputs in ((layers, self._outputs), (layers_hat, self._outputs_hat))
            for name in layers
        ]

    def compare(self, shape: torch.Size, mask: Tensor | None) -> dict[str, Tensor]:
        """Returns the outputs' differences in the batch just seen, float minus compressed, (sequences, length, out).

        Args:
            shape: (sequences, length): some models put all tokens of a batch into one dimension on the way.
            mask: (sequences, length), true where a token counts.
        """
        differences = {}
        for name, shift in self._shifts.items():
            y, y_hat = self._outputs.pop(name, None), self._outputs_hat.pop(name, None)
            if y is None or y_hat is None:  # a pass has not called it
                continue
            y, y_hat = y.reshape(*shape, -1), y_hat.reshape(*shape, -1)
            dtype = torch.promote_types(y.dtype, torch.float32)
            difference = y.to(dtype) - y_hat.to(dtype)
            corrected = _square(difference, mask)
            self._signal[name] += _square(y.to(dtype), mask)
            self._corrected[name] += corrected
            self._rounded[name] += corrected if shift is None else _square(difference + shift, mask)
            differences[name] = difference
        return differences

    def run(self, layers: Mapping[str, nn.Module], layers_hat: Mapping[str, nn.Module], x: Tensor) -> None:
        """Runs the layers of both models on the same inputs (sequences, length, in), and compares them there."""
        for name in layers:
            layers[name](x)
            layers_hat[name](x)
        self.compare(x.shape[:2], None)

    def relative(self, name: str) -> tuple[float, float]:
        """Returns ``E|y - ŷ|² / E|y|²``, without the shift and with it."""
        signal, rounded, corrected = ranks.total([self._signal[name], self._rounded[name], self._corrected[name]])
        return rounded / (signal or 1.0), corrected / (signal or 1.0)

    def close(self) -> None:
        """Lets the layers go."""
        for hook in self._hooks:
            hook.remove()


def _keep(outputs: dict[str, Tensor], name: str, copy: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output.clone() if copy else output

    return hook


def _square(values: Tensor, mask: Tensor | None) -> float:
    counted = values if mask is None else values[mask.bool()]
    return float(torch.linalg.vector_norm(counted, dim=-1).double().square().sum())
