"""Makes room in a quantized model for the corrections of a saved one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from opt8bit.ptq.correction.compensation import BiasCompensation
from opt8bit.ptq.correction.folding import channel_axis_of
from opt8bit.ptq.correction.placing import COMPENSATION, Behind, BiasPlace
from opt8bit.ptq.pairs.outputs import Element, element_of, with_element


def prepare_corrected(
    quantized: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    element: Element = None,
    channel_axis: int = -1,
) -> None:
    """Gives a quantized model, in place, the biases that a corrected one has, so that ``load_state_dict`` fills them.

    New biases and those of a :class:`BiasCompensation` are zeros until the state dict is loaded.

    Args:
        quantized: the model as it was before :func:`correct`.
        state_dict: of the corrected model.
        element, channel_axis: as they were given to :func:`correct`.

    Raises:
        ValueError: the model lacks a module whose bias is in the state dict. Nothing has changed then.
    """
    modules = dict(quantized.named_modules())
    suffix = f"{COMPENSATION}.bias"
    behind = {name.removesuffix(suffix).removesuffix("."): bias for name, bias in _ending(state_dict, suffix).items()}
    missing = [name for name in behind if name not in modules]
    if missing:
        raise ValueError(f"quantized must have the modules of the corrected model, it lacks {', '.join(missing)}")
    for name, bias in behind.items():
        axis = channel_axis_of(modules[name])
        compensation = BiasCompensation(
            len(bias), channel_axis if axis is None else axis, device=bias.device, dtype=bias.dtype
        )
        title = name or "the model"
        read = partial(element_of, element=element, name=title)
        Behind(modules[name], compensation, read, partial(with_element, element=element)).put()
    for name, bias in _ending(state_dict, "bias").items():
        module = modules.get(name.removesuffix("bias").removesuffix("."))
        place = None if module is None else BiasPlace.of(module)
        if place is not None and place.bias is None:
            place.set(torch.zeros_like(bias))


def _ending(state_dict: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {name: value for name, value in state_dict.items() if f".{name}".endswith(f".{suffix}")}
