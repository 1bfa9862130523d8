"""Parameters that lie in shards on several processes: DTensors, as FSDP2 and tensor parallelism make them.

Each process steps the shard that it has, as if that were a parameter. What depends on the whole is decided here, so
that it does not depend on how many processes there are: whether states have 8 bits, and which elements share a block.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opt8bit.backends import stored_as
from opt8bit.quant import block_view

_, SCALE = stored_as("")  # what the names of scales end with


@functools.cache
def _distributed() -> Any:
    """Returns torch.distributed.tensor, or None where this torch has none."""
    try:
        return importlib.import_module("torch.distributed.tensor")
    except ImportError:
        return None


def _is_wrapper(tensor: Any) -> bool:
    """Tells whether it is of a subclass that holds other tensors."""
    return is_traceable_wrapper_subclass(tensor)


def is_sharded(tensor: Any) -> bool:
    """Tells whether it is a DTensor."""
    # Looked at first, as importing torch.distributed takes a while.
    if not _is_wrapper(tensor) or _distributed() is None:
        return False
    return isinstance(tensor, _distributed().DTensor)


def local(tensor: Any) -> Any:
    """Returns the part of a tensor that this process has: of a DTensor its shard, which shares its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        found = tensor.to_local()
    return found.wait() if hasattr(found, "wait") else found  # where it is still on its way


def everywhere(tensor: Any) -> Any:
    """Returns the whole of a tensor, on every process; all must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_grad(grad: Any, param: Any) -> Tensor:
    """Returns the gradient of the parameter's shard on this process."""
    if is_sharded(grad) and is_sharded(param) and grad.device_mesh == param.device_mesh:
        grad = grad.redistribute(placements=param.placements)  # which does nothing where they are placed alike
    return local(grad)


def local_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the states of a parameter's shard on this process."""
    return {name: local(value) for name, value in state.items()}


def placement_of(tensor: Any) -> tuple[Any, ...] | None:
    """Returns how a DTensor lies on the processes, to be compared, or None for any other tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None


def described(param: Any) -> dict[str, Any]:
    """Describes in words how a DTensor lies on the processes."""
    return {"shape": tuple(param.shape), "placements": tuple(param.placements), "mesh": param.device_mesh.shape}


def sharded(state: Mapping[str, Tensor], param: Tensor, block_size: int) -> dict[str, Tensor]:
    """Returns the states of a parameter's shard as those of the parameter: DTensors, placed as it is.

    Args:
        state: by name; what has no dimensions is the same on all processes, and left as it is.
    """
    if not is_sharded(param):
        return dict(state)
    blocks = torch.Size(block_view(param.shape, block_size).absmax_shape)
    return {
        name: _whole(tensor, blocks if name.endswith(SCALE) else param.shape + tensor.shape[param.dim() :], param)
        if tensor.dim()
        else tensor
        for name, tensor in state.items()
    }


def _whole(local_tensor: Tensor, shape: torch.Size, param: Any) -> Tensor:
    """Returns the DTensor of a shape, placed as a parameter, of which this process has that part."""
    module = _distributed()
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = param.device_mesh, tuple(param.placements)
    if local_tensor.device.type == mesh.device_type:
        return module.DTensor.from_local(local_tensor, mesh, placements, run_check=False, shape=shape, stride=stride)
    # Which would move it to the mesh's device: states that are kept on the CPU stay there, as those parameters do that
    # FSDP2 keeps there.
    specs: Any = importlib.import_module("torch.distributed.tensor._dtensor_spec")
    meta = specs.TensorMeta(shape, stride, local_tensor.dtype)
    spec = specs.DTensorSpec(mesh, placements, tensor_meta=meta)
    return module.DTensor(local_tensor, spec, requires_grad=False)


def whole(param: Tensor) -> Tensor:
    """Returns a tensor of a DTensor's whole shape, with its dtype and device, that takes no memory."""
    return torch.empty((), dtype=param.dtype, device=param.device).expand(param.shape)


def placed_alike(value: Any, param: Any) -> bool:
    """Tells whether a tensor lies on the processes as a parameter does; one of no dimensions lies on all."""
    return placement_of(value) == placement_of(param) if value.dim() else not is_sharded(value)


def shards_of(where: str, param: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shards on this process of states that lie on the processes as their parameter does.

    Args:
        where: the parameter, in words.

    Raises:
        ValueError: one is not of the parameter's shape.
    """
    for name, value in state.items():
        is_of_blocks = name.endswith((SCALE, "_absmax"))
        is_of_shape = is_of_blocks or not is_sharded(value) or value.shape[: param.dim()] == param.shape
        if not is_of_shape:
            raise ValueError(f"{where}: state {name!r} must have shape {tuple(param.shape)}, got {tuple(value.shape)}")
    return local_states(state)


def cut(state: Mapping[str, Tensor], param: Any) -> dict[str, Tensor]:
    """Cuts the states of a full parameter, which every process has, down to its shard on this process.

    Args:
        param: a DTensor whose states :func:`keeps_blocks`, or are not in blocks.
    """
    return {name: part(tensor, param) if tensor.dim() else tensor for name, tensor in state.items()}


def part(tensor: Tensor, param: Any) -> Tensor:
    """Returns this process's part of a tensor that every process has, placed as a parameter; a copy."""
    sizes, offsets = _extent(tensor.shape, param)
    for dimension, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        tensor = tensor.narrow(dimension, min(offset, tensor.shape[dimension]), size)
    return tensor.clone(memory_format=torch.contiguous_format)


def _extent(shape: torch.Size, param: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the size and offset of this process's part of a tensor that is placed as a parameter."""
    utils: Any = importlib.import_module("torch.distributed.tensor._utils")
    return utils.compute_local_shape_and_global_offset(shape, param.device_mesh, param.placements)


def agree(params: Iterable[Any], is_well: bool) -> bool:
    """Tells whether all is well on all processes that have parts of the parameters; they all must ask."""
    dist: Any = importlib.import_module("torch.distributed")
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_sharded(param)):
        flag = torch.tensor(int(is_well), device=mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(dimension))
        is_well = bool(flag)
    return is_well


def keeps_blocks(param: Tensor, block_size: int) -> bool:
    """Tells whether no block of a parameter is cut by its shards; the same on all processes."""
    return not is_sharded(param) or (param.dim() > 1 and all(_keeps_blocks(param, block_size)))


def _keeps_blocks(param: Any, block_size: int) -> Iterable[bool]:
    """Tells for each dimension of the mesh whether its shards keep blocks whole."""
    view = block_view(param.shape, block_size)
    cuts = [_dimension(placement) for placement in param.placements]
    for dimension, placement, size in zip(cuts, param.placements, param.device_mesh.shape, strict=True):
        if not dimension or size == 1:  # a row is never cut
            yield True
        elif dimension > 1 or type(placement) is not _distributed().Shard or cuts.count(1) > 1:
            yield False
        else:
            chunk = -(-param.shape[1] // size) * (view.row_length // max(param.shape[1], 1))
            yield chunk == -(-view.blocks_per_row // size) * block_size


def _dimensions(param: Any) -> list[int | None]:
    """Returns, for each dimension of the mesh with several processes, the tensor dimension that it shards."""
    pairs = zip(param.placements, param.device_mesh.shape, strict=True)
    return [_dimension(placement) for placement, size in pairs if size > 1]


def _dimension(placement: Any) -> int | None:
    """Returns the tensor dimension that a placement shards, or None."""
    return getattr(placement, "dim", None)  # is_shard() leaves out the shards of FSDP2 over tensor parallelism


def first_element(param: Any) -> int:
    """Returns the index, in the full parameter, of the first element of this process's shard of full rows."""
    if not is_sharded(param):
        return 0
    _, offset = _extent(param.shape, param)
    return offset[0] * (param.numel() // max(param.shape[0], 1)) if offset else 0


def is_divided(param: Any) -> bool:
    """Tells whether no process has all of it."""
    return is_sharded(param) and any(dimension is not None for dimension in _dimensions(param))


def check(param: Any, *, by_chance: bool) -> None:
    """
    Args:
        by_chance: whether the parameter is rounded stochastically.

    Raises:
        TypeError: the parameter is a tensor subclass that is not a DTensor, or a DTensor of one, or is placed as it
            cannot be stepped.
    """
    if not _is_wrapper(param):
        return
    if not is_sharded(param) or _is_wrapper(local(param)):
        kind = type(local(param)).__name__
        raise TypeError(f"parameters must be plain tensors or DTensors of them, got {kind}")
    kind = f"a DTensor placed as {tuple(param.placements)}"
    if any(placement.is_partial() for placement in param.placements):
        raise TypeError(f"a parameter must be sharded or replicated, got {kind}: its values are not known")
    if by_chance and any(_dimensions(param)):
        raise TypeError(f"stochastic_rounding=True takes DTensors sharded along dimension 0 alone, got {kind}")


def check_grad(param: Any) -> None:
    """
    Raises:
        RuntimeError: a parameter is a DTensor and its gradient is not, or the reverse; or they are on two meshes; or
            the gradient is sparse, or not of the parameter's shape.
    """
    grad = param.grad
    assert grad is not None
    if is_sharded(param) != is_sharded(grad):
        kinds = type(grad).__name__, type(param).__name__
        raise RuntimeError("a {} cannot be the gradient of a {}: both or neither must be DTensors".format(*kinds))
    if is_sharded(param) and param.device_mesh != grad.device_mesh:
        raise RuntimeError(f"a gradient must be on its parameter's mesh {param.device_mesh}, got {grad.device_mesh}")
    if not is_sharded(param) and _is_wrapper(grad):
        raise RuntimeError(f"gradients must be plain tensors or DTensors, got {type(grad).__name__}")
    if grad.layout != torch.strided:
        raise RuntimeError(f"gradients must be dense, got layout {grad.layout} (use a sparse optimizer)")
    if grad.shape != param.shape:
        raise RuntimeError(f"a gradient must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}")


def scaling(value: Any) -> Tensor | None:
    """Returns what GradScaler hands over as a tensor; it is a number where there was no gradient to look at."""
    if isinstance(value, Tensor):
        return everywhere(value)
    return None if value is None else torch.tensor(float(value), dtype=torch.float32, device="cpu")
