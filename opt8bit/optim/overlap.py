"""Parameters that share memory: found, so that they are stepped one after another, as torch.optim does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opt8bit.optim.shards import local


def refuse_shared(params: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: parameters share memory, so that no copy of one can be stepped without the other.
    """
    shared = overlapping([local(param) for param in params if not param.is_meta])
    if shared:
        raise ValueError(f"offload takes parameters that have memory of their own: {len(shared)} share theirs")


def overlapping(params: Sequence[Tensor]) -> set[int]:
    """Returns the indices of parameters that may share memory."""
    spans = []
    for index, param in enumerate(params):
        if param.numel() == 0:
            continue
        reach = [(size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)]
        if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
            raise RuntimeError(
                f"several elements of a parameter of shape {tuple(param.shape)} and strides {param.stride()} are one "
                "number in memory: it cannot be updated in place"
            )
        end = param.data_ptr() + (sum(reach) + 1) * param.element_size()
        spans.append((str(param.device), param.data_ptr(), end, index))
    result: set[int] = set()
    furthest = ("", 0, 0, -1)  # the span that ends last, of those that begin before
    for span in sorted(spans):
        is_beside = span[0] == furthest[0]
        if is_beside and span[1] < furthest[2]:
            result |= {furthest[3], span[3]}
        if not is_beside or span[2] > furthest[2]:
            furthest = span
    return result
