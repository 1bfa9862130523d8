"""Optimizer8bit: arguments, state, the one step loop and checkpoints of every optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opt8bit.backends import Backend, GroupUpdate, Rule
from opt8bit.optim.plan import CODEBOOKS, Plan
from opt8bit.quant import block_view

if TYPE_CHECKING:
    pass

MAX_BLOCK_SIZE = 16384  # kMaxBlockSize of kernels/optimizer_step.h: what a thread keeps in its cache
MIN_BLOCK_SIZE = 16
MIN_ROW_LENGTH = 16  # a shorter row's absmax would weigh more than its codes save
MIN_FLAT_LENGTH = 2**20  # a 1-D tensor as long as this is a flattened buffer, not a bias
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUPPORTED_DTYPES = (*CODED_DTYPES, torch.float64)


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes; each is an option of a parameter group, too.

    maximize: ascend instead of descend (default False).
    block_size: elements per block of an 8-bit state, 16 to 16384 (default 256).
    min_8bit_size: tensors of fewer elements keep 32-bit states (default 4096).
    state_bits: 8, or 32 for float32 states throughout (default 8). A parameter that has an attribute
        ``state_bits`` goes by that, whatever its group says.
    fused: True takes compiled kernels or raises, False takes the plain torch reference, None the fastest there is.
    foreach, capturable, differentiable: as in torch.optim, for its callers' sake; True is refused.
    """

    maximize: bool
    block_size: int
    min_8bit_size: int
    state_bits: int
    fused: bool | None
    foreach: bool | None
    capturable: bool
    differentiable: bool


DEFAULTS = Options(
    maximize=False,
    block_size=256,
    min_8bit_size=4096,
    state_bits=8,
    fused=None,
    foreach=None,
    capturable=False,
    differentiable=False,
)


def check_options(group: Mapping[str, Any]) -> None:
    """Refuses what no optimizer of this package can honour.

    Raises:
        ValueError: an option has another value than it can have.
    """
    size = group["block_size"]
    if isinstance(size, bool) or not isinstance(size, int) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block_size must be an integer from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}, got {size!r}")
    least = group["min_8bit_size"]
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise ValueError(f"min_8bit_size must be a non-negative integer, got {least!r}")
    if group["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits must be 8 or 32, got {group['state_bits']!r}")
    for name in ("foreach", "capturable", "differentiable"):
        if group[name]:
            raise ValueError(f"{name}=True is not supported: the step is one fused call; leave {name} out")


def check_not_negative(**values: float | Tensor) -> None:
    """Raises as torch.optim does, with its words.

    Raises:
        ValueError: a value is negative or NaN; an ``lr`` tensor has more than one element.
    """
    for name, value in values.items():
        label = {"lr": "learning rate", "eps": "epsilon value"}.get(name, f"{name} value")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        if not 0.0 <= value:
            raise ValueError(f"Invalid {label}: {value}")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises as torch.optim does, with its words.

    Raises:
        ValueError: a beta is not in [0, 1).
    """
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


class Optimizer8bit(torch.optim.Optimizer):
    """The base of every optimizer here. A subclass gives its arguments, and its rule for a group.

    ``state[p]`` holds, by torch.optim's names, ``step`` (a float32 scalar) and for each state of the rule either
    ``name``, float32 of p's shape, or ``name``, uint8 codes of p's shape, with ``name_absmax``, float32 of shape
    (rows, blocks per row). Signed states are coded by the signed dynamic map, others by the unsigned one.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        unknown = set(options) - set(DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}")
        super().__init__(params, {**defaults, **DEFAULTS, **options})

    @abstractmethod
    def rule(self, group: dict[str, Any]) -> Rule:
        """The update rule of a parameter group."""

    @abstractmethod
    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        """The rule's hyper-parameters, ``rule.hyper``, from a parameter group."""

    @abstractmethod
    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyper-parameters that torch.optim refuses."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch.optim does, after its options and parameters have been checked.

        Raises:
            ValueError: an option has a value it cannot have.
            TypeError: a parameter is complex, a DTensor, or of a dtype that cannot be optimized.
        """
        group = {**self.defaults, **param_group}
        check_options(group)
        self.check_group(group)
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for param in params:
            param = param[1] if isinstance(param, tuple) else param
            if isinstance(param, Tensor) and is_traceable_wrapper_subclass(param):
                raise TypeError(f"{type(param).__name__} parameters are not supported yet")
            if isinstance(param, Tensor) and param.dtype not in SUPPORTED_DTYPES:
                names = ", ".join(map(str, SUPPORTED_DTYPES))
                raise TypeError(f"parameters must be one of {names}, got {param.dtype}")
        super().add_param_group({**param_group, "params": params})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in one call per device.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or is not of its parameter's shape. Nothing has been updated then.
            ValueError: ``fused=True`` and no compiled kernels can serve a parameter; or a state is not of its
                parameter's shape and dtype, or was made with another block size. Nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything is checked before the first backend writes.
        batches = [batch for i, group in enumerate(self.param_groups) for batch in self._batches(i, group)]
        work: dict[Backend, list[GroupUpdate]] = {}
        for backend, update in batches:
            work.setdefault(backend, []).append(update)
        for backend, updates in work.items():
            backend.step(updates)
        return loss

    def _batches(self, index: int, group: dict[str, Any]) -> list[tuple[Backend, GroupUpdate]]:
        params, grads = _with_gradients(group["params"])
        rule = self.rule(group)
        key = (rule, group["block_size"], group["fused"])
        hyper = self.hyper(group)
        plans = self.__dict__.setdefault("_plans", {})
        plan = plans.get(index)
        batches = plan.batches(key, params, grads, self.state, hyper) if plan else None
        if batches is None:
            check_options(group)  # anew, as a user may write into it
            for param, grad in zip(params, grads, strict=True):
                _check_grad(param, grad)
                _initialize(self.state[param], rule, param, group)
            plan = plans[index] = Plan(key, params, grads, self.state)
            batches = plan.batches(key, params, grads, self.state, hyper)
            assert batches is not None
        return batches

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; training then continues bit for bit.

        torch.optim casts every loaded tensor to its parameter's dtype; codes and their absmax keep theirs here.

        Raises:
            ValueError: the groups do not match, or a state is not of its parameter's shape. Nothing has been
                changed then.
        """
        # Registered only now, so that hooks of the user's see and may change the plain state dict.
        box = self.register_load_state_dict_pre_hook(_box_states)
        unbox = self.register_load_state_dict_post_hook(_unbox_states, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            box.remove()
            unbox.remove()


def _with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    grads = list(map(attrgetter("grad"), params))
    if not any(map(is_, grads, repeat(None))):
        return params, grads
    pairs = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
    return [param for param, _ in pairs], [grad for _, grad in pairs]


def _check_grad(param: Tensor, grad: Tensor) -> None:
    if is_traceable_wrapper_subclass(param) or is_traceable_wrapper_subclass(grad):
        raise RuntimeError(f"{type(param).__name__} parameters with {type(grad).__name__} gradients are not supported")
    if grad.layout != torch.strided:
        raise RuntimeError(f"gradients must be dense, got layout {grad.layout} (use a sparse optimizer)")
    if grad.shape != param.shape:
        raise RuntimeError(f"a gradient must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}")


def is_8bit(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the states of a parameter in a group are stored as 8-bit codes."""
    if getattr(param, "state_bits", group["state_bits"]) == 32 or param.dtype not in CODED_DTYPES:
        return False
    if param.numel() < max(group["min_8bit_size"], 1):
        return False
    if param.dim() < 2:
        return param.numel() >= MIN_FLAT_LENGTH
    return param.numel() // param.shape[0] >= MIN_ROW_LENGTH


def _initialize(state: dict[str, Tensor], rule: Rule, param: Tensor, group: Mapping[str, Any]) -> None:
    """Adds what a rule needs and the state lacks: zeros."""
    state.setdefault("step", torch.zeros((), dtype=torch.float32))
    coded = is_8bit(param, group)
    stored = [name for name in rule.states if name in state]
    if stored:  # a state that is added later is stored as those that are there
        coded = f"{stored[0]}_absmax" in state
    for name, signed in rule.states.items():
        if name in state:
            continue
        if coded:
            zero = int((CODEBOOKS[signed] == 0).nonzero())
            state[name] = torch.full(param.shape, zero, dtype=torch.uint8, device=param.device)
            shape = block_view(param.shape, group["block_size"]).absmax_shape
            state[f"{name}_absmax"] = torch.zeros(shape, dtype=torch.float32, device=param.device)
        else:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)


class _Boxed:
    """A loaded tensor that torch.optim shall not cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _box_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks the states of a state dict against the parameters, and boxes them."""
    for number, saved in enumerate(state_dict["param_groups"]):
        missing = sorted(set(optimizer.defaults) - set(saved))
        if missing:
            kind = type(optimizer).__name__
            raise ValueError(f"parameter group {number} is not one of {kind}: it has no {', '.join(missing)}")
        check_options(saved)
    params = _params_by_index(optimizer.param_groups, state_dict["param_groups"])
    states = {}
    for index, state in state_dict["state"].items():
        if index in params:
            param, group = params[index]
            _check_state(f"parameter {index}", param, group, state)
        states[index] = {name: _Boxed(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    return {**state_dict, "state": states}


def _unbox_states(optimizer: torch.optim.Optimizer) -> None:
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, _Boxed):
                device = "cpu" if name == "step" else param.device
                state[name] = value.tensor.detach().to(device).clone(memory_format=torch.contiguous_format)


def _params_by_index(
    groups: Iterable[dict[str, Any]], saved_groups: Iterable[dict[str, Any]]
) -> dict[Any, tuple[Tensor, dict[str, Any]]]:
    pairs = zip(groups, saved_groups, strict=False)
    return {
        index: (param, saved)
        for group, saved in pairs
        for index, param in zip(saved["params"], group["params"], strict=False)
    }


def _check_state(where: str, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: state {name!r} must be a tensor, got {type(value).__name__}")
        if name == "step":
            expected, dtypes = torch.Size(), (torch.float32,)
        elif name.endswith("_absmax"):
            view = block_view(param.shape, group["block_size"])
            expected, dtypes = torch.Size(view.absmax_shape), (torch.float32,)
        elif f"{name}_absmax" in state:
            expected, dtypes = param.shape, (torch.uint8,)
        else:
            expected, dtypes = param.shape, (torch.promote_types(param.dtype, torch.float32),)
        if value.shape != expected or value.dtype not in dtypes:
            raise ValueError(
                f"{where}: state {name!r} must have shape {tuple(expected)} and be {dtypes[0]}, "
                f"got {tuple(value.shape)} and {value.dtype}"
            )
