"""Optimizer8bit: arguments, states and checkpoints of every optimizer; its steps are in stepping.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opt8bit.backends import stored_as, warn
from opt8bit.optim import shards
from opt8bit.optim.checkpoint import reading
from opt8bit.optim.groups import Policy
from opt8bit.optim.offload import BACKWARD
from opt8bit.optim.options import DEFAULTS, KEPT, Options, check_options
from opt8bit.optim.overlap import refuse_shared
from opt8bit.optim.pickled import renew
from opt8bit.optim.states import is_cut, is_flattened
from opt8bit.optim.stepping import Stepping
from opt8bit.quant import decode_state

CUT_BLOCKS = (
    "the states of {count} parameters are kept in 32 bits, as shards cut blocks of block_size={block_size} elements; "
    "the first is of shape {shape}, placed as {placements} on a mesh of {mesh}. Of parameters with two dimensions "
    "or more blocks stay whole where the first is sharded, or the second in parts of a multiple of block_size"
)
FLATTENED = (
    "the states of {count} parameters are kept in 32 bits, as FSDP1 (FullyShardedDataParallel) flattens parameters and "
    "cuts them anywhere; fully_shard, which is FSDP2, keeps 8 bits"
)


class Optimizer8bit(Stepping):
    """The base of every optimizer here. A subclass gives its arguments, and its rule for a group.

    ``state[p]`` holds ``step``, a float32 scalar, and each state of the rule. In 32 bits a state is ``name``, by
    torch.optim's name, float32 of p's shape. In 8 bits it is ``name_codes``, uint8 of p's shape, and ``name_scale``,
    float32 of shape (rows, blocks per row): see :func:`opt8bit.quant.encode_state`. :meth:`dequantized_state` returns
    either as floats. What others keep in ``state[p]`` is left alone.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        unknown = set(options) - set(DEFAULTS)
        if unknown:
            message = f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}"
            raise TypeError(f"{message}: it has {', '.join([*defaults, *DEFAULTS])}")
        super().__init__(params, {**defaults, **DEFAULTS, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        renew(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` leaves the unscaling to :meth:`step`: if every group says ``fused=True``.

        As in torch.optim. What asks for gradients that are unscaled before the step, as Lightning's clipping does,
        takes optimizers only that do not. With ``offload="backward"``, too, as the step then refuses the scaler, which
        comes too late.
        """
        is_too_late = any(group["offload"] == BACKWARD for group in self.param_groups)
        return is_too_late or all(group["fused"] is True for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch.optim does, after its options and parameters have been checked.

        Raises:
            ValueError: an option has a value it cannot have.
            TypeError: a parameter is of a dtype that cannot be optimized, or a DTensor whose shards cannot be.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # which refuses it
        group = {**self.defaults, **param_group}
        check_options(group)
        self.checked_rule(group)
        params = param_group["params"]
        if isinstance(params, Tensor):
            params = [params]
        elif not isinstance(params, set):  # which torch.optim refuses
            params = list(params)
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        tensors = [param for param in tensors if isinstance(param, Tensor)]  # torch.optim refuses the others
        for param in tensors:
            if param.requires_grad:
                self._check_supported(param, group)
            else:  # may be of any kind, but where torch.optim, too, looks at its shape
                self.check_param(param, group)
        if group["offload"]:
            others = [of for group in self.param_groups if group["offload"] for of in group["params"]]
            refuse_shared([*others, *tensors])
        param_group["params"] = params
        super().add_param_group(param_group)
        self._running.backward.watch()
        _warn_of_full_states([param for param in tensors if param.requires_grad], group)

    @torch.no_grad()
    def dequantized_state(self, param: Tensor) -> dict[str, Tensor]:
        """Returns the states of a parameter as floats, by torch.optim's names: what a step starts from.

        Args:
            param: one of the optimizer's.

        Returns:
            New tensors: each state in full, on the device that it lies on, a DTensor if the parameter is one; and
            ``step``. Empty where the parameter has no states yet.

        Raises:
            KeyError: the optimizer does not have the parameter.
        """
        groups = [group for group in self.param_groups if any(param is each for each in group["params"])]
        if not groups:
            raise KeyError("the optimizer does not have this parameter")
        self._running.backward.wait()
        (group,), state = groups, shards.local_states(self.state.get(param, {}))
        result = {}
        for name, signed in self.rule(group).states.items():
            codes, scale = stored_as(name)
            if name in state:
                result[name] = state[name].clone()
            elif codes in state:
                result[name] = decode_state(state[codes], state[scale], signed, group["block_size"])
        if "step" in state:
            result["step"] = state["step"].clone()
        return shards.sharded(result, param, group["block_size"])

    def state_dict(self) -> dict[str, Any]:
        """Returns what torch.optim does, in tensors of the optimizer's own; see the class for the states.

        It is for optimizers of this package. torch.optim's do not all refuse it: AdamW fails at its first step, but
        SGD and Muon begin their momentum again without a word. For them there is
        :func:`opt8bit.optim.to_torch_state_dict`.
        """
        self._running.backward.wait()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._running.backward.wait()
        return super().__getstate__()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, of its counterpart in torch.optim, or of bitsandbytes.

        Hyper-parameters come from the state dict; the options that say how states are stored and computed (every
        option but ``maximize`` and ``caution``) stay as they are. States that are stored otherwise than those say, in
        blocks of another size or with other bits, are converted; those that are stored alike are taken bit for bit, and
        training continues bit for bit. The state dict is left alone, and shares no memory with the optimizer.

        Hyper-parameters that bitsandbytes' groups lack keep their values. Its Adam decays weights as AdamW does, so
        ``Adam8bit`` becomes ``decoupled_weight_decay`` by it. The states of its LARS are refused: they are
        not those of the paper.

        Args:
            state_dict: as :meth:`state_dict` returned it.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: a parameter group or a state is not one of this optimizer and its parameters: it is
                missing, unknown, of another shape, dtype or kind, or has a value that it cannot have. The message
                names the parameter. Nothing has been changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"a state dict must be a dict, got {type(state_dict).__name__}")

        def check_loaded(group: dict[str, Any]) -> None:
            check_options(group)
            self.checked_rule(group)

        self._running.backward.wait()
        with reading(self, Policy(KEPT, check_loaded)):
            super().load_state_dict(state_dict)
        self._running.backward.drop()
        self._running.plans.clear()  # which hold on to the states there were


def _warn_of_full_states(params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """Tells of parameters whose states would have been in 8 bits on one process."""
    cut = [param for param in params if is_cut(param, group)]
    if cut:
        about = shards.described(cut[0])
        warn(CUT_BLOCKS.format(count=len(cut), block_size=group["block_size"], **about))
    flattened = [param for param in params if is_flattened(param, group)]
    if flattened:
        warn(FLATTENED.format(count=len(flattened)))
