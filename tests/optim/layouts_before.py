"""State dicts of the old layout: codes of the ascending maps under torch.optim's names, beside an absmax."""

import copy
from typing import Any

from torch import Tensor

from opt8bit.optim.base import Optimizer8bit
from opt8bit.quant import decode_state, dynamic_map, quantize_blockwise


def old_state_dict(optimizer: Optimizer8bit) -> dict[str, Any]:
    """Returns a copy of the state dict, its 8-bit states coded from their values as the versions before did it.

    (The largest of a block had no sign, so that a block whose largest is negative decodes to other numbers.)
    """
    state_dict = copy.deepcopy(optimizer.state_dict())
    groups = {key: group for group in state_dict["param_groups"] for key in group["params"]}
    for key, state in state_dict["state"].items():
        for name, signed in optimizer.rule(groups[key]).states.items():
            if f"{name}_codes" in state:
                parts = state.pop(f"{name}_codes"), state.pop(f"{name}_scale")
                state |= old_state(name, *parts, signed, groups[key]["block_size"])
    return state_dict


def old_state(name: str, codes: Tensor, scale: Tensor, signed: bool, block_size: int) -> dict[str, Tensor]:
    """Returns one state in the old layout."""
    values = decode_state(codes, scale, signed, block_size)
    old_codes, absmax = quantize_blockwise(values, dynamic_map(signed), block_size)
    return {name: old_codes, f"{name}_absmax": absmax}
