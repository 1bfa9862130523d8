"""Options that every optimizer takes, and the checks of them and of torch.optim's hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from numbers import Real
from typing import Any, TypedDict

from torch import Tensor

from opt8bit.optim.offload import BACKWARD
from opt8bit.optim.reading import is_number

MAX_BLOCK_SIZE = 16384  # kMaxBlockSize of kernels/optimizer_step.h: what a thread keeps in its cache
MIN_BLOCK_SIZE = 16
LEAST = {"lr": -1e-12}  # where it is not 0: torch's schedulers that end at zero may end a rounding error below it


class Options(TypedDict, total=False):
    """Lists keyword arguments that every optimizer takes; each is an option of a parameter group, too.

    Attributes:
        maximize: ascend instead of descend (default False).
        caution: leave out of a step the elements that it would move against their gradients, and scale it by one over
            the share of the others in the whole parameter (default False). AdamW, Adam, Lion and SGD with momentum have
            it.
        stochastic_rounding: round bfloat16 parameters up or down randomly, so that small updates are not lost but come
            through on average (default False). Other dtypes are not affected; float16 is refused.
        compensation: keep beside a bfloat16 parameter the 16 bits that it has no room for, so that it is trained as a
            float32 one (default False). Two bytes a parameter, as the state ``compensation``; they belong to the value
            that the optimizer wrote last.
        seed: of stochastic rounding, an integer from 0 to 2^63 - 1 (default 0). Equal seeds round alike, on every rank.
        block_size: elements per block of an 8-bit state, 16 to 16384 (default 256).
        min_8bit_size: tensors of fewer elements keep 32-bit states (default 4096).
        state_bits: 8, or 32 for float32 states throughout (default 8). A parameter that has an attribute ``state_bits``
            goes by that, whatever its group says. ``copy.deepcopy``, ``fully_shard`` and
            ``load_state_dict(assign=True)`` make new parameters without it: set it on those, or give them a group with
            ``state_bits``. Like ``min_8bit_size``, it is asked for when states are made, and does not change those that
            are there.
        fused: True takes compiled kernels or raises, False takes the plain torch reference, None the fastest there is.
        capturable: a step may be captured in a CUDA graph (default False): for parameters on a GPU that Triton serves;
            with ``lr`` a tensor there, each replay of the graph reads it. Take a step like it before, and keep the
            gradients and the group as they are as long as the graph is replayed. A graph holds at most four steps.
        offload: True keeps the states on the CPU and takes the step there, for parameters that are on a GPU (default
            False): each step copies them and their gradients over and the parameters back. "backward" has each
            parameter stepped while the backward pass goes on to the next: it takes one backward pass for each step, and
            gradients that nobody changes in between (no clipping, no GradScaler). Parameters change when :meth:`step`
            is called; an error in it leaves states ahead of them.
        foreach: as in torch.optim, for its callers' sake; it changes nothing, as the step is one call for all
            parameters.
        differentiable: likewise; True is refused.
    """

    maximize: bool
    caution: bool
    stochastic_rounding: bool
    compensation: bool
    seed: int
    block_size: int
    min_8bit_size: int
    state_bits: int
    fused: bool | None
    foreach: bool | None
    capturable: bool
    offload: bool | str
    differentiable: bool


DEFAULTS = Options(
    maximize=False,
    caution=False,
    stochastic_rounding=False,
    compensation=False,
    seed=0,
    block_size=256,
    min_8bit_size=4096,
    state_bits=8,
    fused=None,
    foreach=None,
    capturable=False,
    offload=False,
    differentiable=False,
)

KEPT = tuple(name for name in DEFAULTS if name not in ("maximize", "caution"))  # what loading does not change


def _is_integer(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {  # whether an option may have a value, and which it may
    "maximize": (lambda value: isinstance(value, bool), "True or False"),
    "caution": (lambda value: isinstance(value, bool), "True or False"),
    "stochastic_rounding": (lambda value: isinstance(value, bool), "True or False"),
    "compensation": (lambda value: isinstance(value, bool), "True or False"),
    "seed": (lambda value: _is_integer(value, 0, 2**63 - 1), "an integer from 0 to 2^63 - 1"),
    "block_size": (
        lambda value: _is_integer(value, MIN_BLOCK_SIZE, MAX_BLOCK_SIZE),
        f"an integer from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}",
    ),
    "min_8bit_size": (lambda value: _is_integer(value, 0, 2**63 - 1), "a non-negative integer"),
    "state_bits": (lambda value: value in (8, 32), "8 or 32"),
    "fused": (lambda value: value is None or isinstance(value, bool), "True, False or None"),
    "foreach": (lambda value: value is None or isinstance(value, bool), "True, False or None"),
    "differentiable": (lambda value: not value, "left out: autograd does not see what kernels write"),
    "capturable": (lambda value: isinstance(value, bool), "True or False"),
    "offload": (lambda value: isinstance(value, bool) or value == BACKWARD, f"True, False or {BACKWARD!r}"),
}


def check_options(group: Mapping[str, Any]) -> None:
    """Refuses what no optimizer of this package can honour.

    Raises:
        ValueError: an option has another value than it can have.
    """
    for name, (is_allowed, allowed) in ALLOWED.items():
        if not is_allowed(group[name]):
            raise ValueError(f"{name} must be {allowed}, got {group[name]!r}")
    if group["stochastic_rounding"] and group["compensation"]:
        raise ValueError("compensation=True leaves nothing to round by chance: leave stochastic_rounding out")


def is_on_device(value: Any) -> bool:
    """Tells whether a value lies where looking at it would wait for a device, so that nobody does."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def check_not_negative(**values: float | Tensor) -> None:
    """Raises as torch.optim does, with its words.

    Raises:
        ValueError: a value is negative, NaN or no number; an ``lr`` tensor has more than one element.
    """
    for name, value in values.items():
        check_real(name, value)
        label = {"lr": "learning rate", "eps": "epsilon value"}.get(name, f"{name} value")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        if not is_on_device(value) and not LEAST.get(name, 0.0) <= value:
            raise ValueError(f"Invalid {label}: {value}")


def check_real(name: str, value: object) -> None:
    """Refuses what cannot be compared with a number, such as a string, which a configuration may hold.

    Raises:
        ValueError: it is neither a number nor a tensor.
    """
    if not isinstance(value, (Real, Tensor)):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_number(name: str, value: object) -> None:
    """
    Raises:
        ValueError: it is not a finite number.
    """
    if not is_number(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_finite(group: Mapping[str, Any], *names: str) -> None:
    """Refuses what is not a finite number, except tensors, which may lie on a device.

    NaN is left to :func:`check_not_negative`, which has torch.optim's words for it.

    Raises:
        ValueError: a hyper-parameter is of another kind, or infinite.
    """
    for name in names:
        value = group[name]
        is_nan = isinstance(value, float) and math.isnan(value)
        if not is_nan and not isinstance(value, Tensor):
            check_number(name, value)


def check_flags(group: Mapping[str, Any], *names: str) -> None:
    """Refuses what is not a bool: a string, which a configuration may hold, would count as True.

    Raises:
        ValueError: a value is neither True nor False.
    """
    for name in names:
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")


def check_count(name: str, values: Any, count: int) -> None:
    """
    Raises:
        ValueError: they are not ``count`` values in their order.
    """
    if isinstance(values, (str, Mapping, Set)) or not isinstance(values, Sized) or len(values) != count:
        raise ValueError(f"{name} must be {count} numbers, got {values!r}")


def check_betas(betas: Sequence[float | Tensor], count: int = 2) -> None:
    """Raises as torch.optim does, with its words.

    Raises:
        ValueError: there are not ``count`` betas, one is not in [0, 1), or a tensor is not of one element or
            beside a float.
    """
    check_count("betas", betas, count)
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        check_real(f"betas[{index}]", beta)
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element")
        if not is_on_device(beta) and not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
