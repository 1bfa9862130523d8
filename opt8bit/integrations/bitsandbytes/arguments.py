"""Translates the arguments that all of bitsandbytes' optimizers share: how states are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opt8bit.integrations.reading import read

# Arguments with one value that asks for nothing, and what to do instead of giving another.
FIXED: dict[str, tuple[Any, str]] = {
    "block_wise": (True, "optim_bits=32 keeps states exact; in 8 bits they always are in blocks"),
    "percentile_clipping": (100, "clip gradients before the step, by torch.nn.utils.clip_grad_norm_ or max_grad_norm"),
    "skip_zeros": (False, "freeze what is not to be updated, or set its gradient to None"),
    "max_unorm": (0.0, "take LAMB or LARS, whose steps follow the norms of the parameters"),
}
OF_ARGS = ("optim_bits", "min_8bit_size", *FIXED)


def of_args(args: Any) -> dict[str, Any]:
    """Returns what the object ``args`` says, strings read; in bitsandbytes it replaces all arguments of these names.

    Args:
        args: None, an object with some of ``OF_ARGS`` as attributes and any others, as a command line's arguments are,
            or a mapping with keys from ``OF_ARGS``.

    Raises:
        ValueError: the mapping has another key.
    """
    others = sorted(set(args) - set(OF_ARGS)) if isinstance(args, Mapping) else []
    if others:
        raise ValueError(f"args may have {', '.join(OF_ARGS)}, got {', '.join(others)}")
    said = args if isinstance(args, Mapping) else {name: getattr(args, name) for name in OF_ARGS if hasattr(args, name)}
    return {name: read(said[name]) for name in OF_ARGS if name in said}


def refuse_others(name: str, said: dict[str, Any]) -> None:
    """Takes the arguments of ``FIXED`` out of those that were said.

    Args:
        name: of the optimizer.
        said: arguments by name; it is changed.

    Raises:
        ValueError: one has another value than it can have here.
    """
    for argument, (value, instead) in FIXED.items():
        found = said.pop(argument, value)
        if found != value:
            raise ValueError(f"{name}: {argument} must be {value!r}, got {found!r}. Instead, {instead}")


def checked_bits(name: str, optim_bits: Any, bits: int | None, default: Any) -> int:
    """Returns how many bits states have.

    Args:
        name: of the optimizer.
        optim_bits: what was asked for.
        bits: what the optimizer's name says, if it says something.
        default: of the argument, which names that say it ignore.

    Raises:
        ValueError: there are no states of that many bits, or the name says otherwise.
    """
    allowed = (8, 32) if bits is None else (bits, default)
    if isinstance(optim_bits, bool) or optim_bits not in allowed:
        words = "8 or 32" if bits is None else f"{bits} or left out"
        raise ValueError(f"{name}: optim_bits must be {words}, got {optim_bits!r}")
    return bits or int(optim_bits)


def storage(
    name: str,
    optim_bits: Any,
    args: Any,
    min_8bit_size: int,
    is_paged: bool,
    options: Mapping[str, Any],
    *,
    bits: int | None,
    default_bits: Any,
) -> dict[str, Any]:
    """Returns options of this package for bitsandbytes' arguments.

    Paged states are those that leave the memory of an accelerator to the CPU's: ``offload=True`` where there is one.

    Args:
        name: of the optimizer.
        optim_bits, args, min_8bit_size, is_paged: as bitsandbytes has them.
        options: further ones, of this package or of older bitsandbytes.
        bits: what the optimizer's name says, if it says something.
        default_bits: the default of ``optim_bits``.

    Raises:
        ValueError: an argument has a value that is not honoured here.
        TypeError: options say ``state_bits``, which is ``optim_bits`` here.
    """
    said = {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size, **options, **of_args(args)}
    if not isinstance(is_paged, bool):
        raise ValueError(f"{name}: is_paged must be True or False, got {is_paged!r}")
    if "state_bits" in said:
        raise TypeError(f"{name} takes optim_bits for state_bits")
    refuse_others(name, said)
    said["state_bits"] = checked_bits(name, said.pop("optim_bits"), bits, default_bits)
    if is_paged and has_accelerator():
        said.setdefault("offload", True)
    return said


def has_accelerator() -> bool:
    """Tells whether parameters can lie outside of the CPU's memory."""
    return torch.cuda.is_available() or torch.xpu.is_available()
