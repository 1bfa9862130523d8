"""The group size of a recipe that names none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from opt8bit.backends import first_of, warn
from opt8bit.ptq import ranks
from opt8bit.ptq.model.blocks import block_layers, by_pattern, find_blocks, matrix
from opt8bit.recipe.overrides import Override
from opt8bit.recipe.recipe import GROUP_SIZES

NAMED = 4  # layers that a warning is about


def default_group_size(model: nn.Module, overrides: Sequence[Override], sizes: Sequence[int] = GROUP_SIZES) -> int:
    """Returns the largest of some sizes that divides the inputs of all layers; 0, for whole rows, where none does.

    Args:
        model: to be compressed.
        overrides: of the recipe. Layers that they leave, or give a group size of their own, have no say.
        sizes: to choose from, the largest first.

    Warns:
        UserWarning: most layers would have larger groups if it were not for a few.
    """
    own = [each.pattern for each in overrides if each.options is None or "group_size" in dict(each.options)]
    inputs = {
        name: matrix(layer).shape[1]
        for name, layer in block_layers(model).items()
        if not any(fnmatchcase(name, pattern) for pattern in own)
    }
    odd = {size: [name for name, length in inputs.items() if length % size] for size in sizes}
    chosen = next((size for size in sizes if not odd[size]), 0)
    wanted = next((size for size in sizes if 2 * len(odd[size]) < len(inputs)), 0)
    if wanted > chosen and not ranks.rank():
        _warn(odd[wanted], chosen, wanted, model)
    return chosen


def _warn(layers: Sequence[str], chosen: int, wanted: int, model: nn.Module) -> None:
    prefix, blocks = find_blocks(model)
    found = [pattern for pattern, _ in by_pattern(dict.fromkeys(layers, ""), prefix, len(blocks))]
    recipe = json.dumps({"overrides": [{"layers": pattern, "skip": True} for pattern in found]})
    names = first_of(found, NAMED)
    groups = f"groups of {chosen}" if chosen else "one scale for each row"
    warn(
        f"all layers get {groups}, because {wanted} does not divide the inputs of {names}. To leave those as they are, "
        f"and have groups of {wanted} in all others: --recipe FILE with {recipe}"
    )
