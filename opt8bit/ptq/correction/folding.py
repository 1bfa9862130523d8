"""Finds the channels of a layer's output, and makes a bias behind a layer part of the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.blocks import is_linear, matrix

CONVOLUTIONS: dict[type[nn.Module], int] = {  # and the dimensions of their images
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


def image_dims(layer: nn.Module) -> int | None:
    """Returns the dimensions of a convolution's images, or None if it is none."""
    return next((dims for kind, dims in CONVOLUTIONS.items() if isinstance(layer, kind)), None)


def channel_axis_of(layer: nn.Module) -> int | None:
    """Returns the dimension of the channels in a layer's output, from the back, or None for an unknown class."""
    if is_linear(layer):
        return -1
    dims = image_dims(layer)
    return None if dims is None else -(dims + 1)


def fold(
    bias: Tensor,  # (channels,)
    layer: nn.Module,
    channel_axis: tuple[int, ...],
    dims: int | None,
) -> None:
    """Adds a bias of a layer's outputs to the layer's own.

    Args:
        bias: that is added.
        layer: that gets it.
        channel_axis: of the bias in the outputs.
        dims: of the outputs; None if that is not known.

    Raises:
        TypeError, ValueError: as :meth:`BiasCompensation.fold_into`.
    """
    wanted = channel_axis_of(layer)
    if wanted is None:
        raise TypeError(f"layer must be nn.Linear, Conv1D, or a convolution in 1 to 3 dimensions, got {type(layer)}")
    if len(channel_axis) != 1:
        raise ValueError(f"a bias over {len(channel_axis)} dimensions has no place in a layer")
    (axis,) = channel_axis
    images = image_dims(layer)
    if axis >= 0:
        dims = images + 2 if dims is None and images is not None else dims  # those of a batch
        if dims is None:
            raise ValueError(f"channel_axis must count from the back to fold a bias without an update, got {axis}")
        axis -= dims
    if axis != wanted:
        raise ValueError(f"channel_axis must be {wanted} for {type(layer).__name__}, got {axis}")
    weight: Tensor = layer.weight  # type: ignore[assignment]
    channels = len(matrix(layer)) if images is None else int(layer.out_channels)  # type: ignore[arg-type]
    if len(bias) != channels:
        raise ValueError(f"the layer must have {len(bias)} channels, got {channels}")
    had: Tensor | None = layer.bias  # type: ignore[assignment]
    if had is None:
        layer.bias = nn.Parameter(bias.to(weight.device, weight.dtype, copy=True), requires_grad=weight.requires_grad)
    else:
        had.copy_(raised(had, bias))


def raised(bias: Tensor, shift: Tensor) -> Tensor:
    """Returns a bias plus what corrects it, added in float64, in the bias's own dtype."""
    return (bias.to(torch.float64) + shift.to(bias.device, torch.float64)).to(bias.dtype)
