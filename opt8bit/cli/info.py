"""``opt8bit info``: what serves which device, and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

from opt8bit.backends import REFERENCE, available, backend_for, native, why
from opt8bit.cli.errors import CommandError


def report() -> str:
    """Returns the text that ``opt8bit info`` prints.

    Raises:
        CommandError: the environment asks for a backend that is not there.
    """
    sets = native.instruction_sets()
    pool = "torch's pool" if native.torch_parallel_for() else "its own (torch before 2.10 does not export its pool)"
    lines = [
        ("opt8bit", version("opt8bit")),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", f"{os.cpu_count()} cores; torch reports {torch.backends.cpu.get_cpu_capability()}"),
        ("kernels", ", ".join(sets) if sets else "not compiled"),
        ("threads", f"{torch.get_num_threads()} of {pool if sets else 'torch'}"),
    ]
    for device in devices():
        lines.append((device, f"{served_by(device)} ({why(device)})"))
    return "\n".join(f"{name:<10} {value}" for name, value in lines)


def devices() -> list[str]:
    """Returns the types of the devices that this torch can use."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return ["cpu", *([accelerator.type] if accelerator else [])]


def served_by(device: str) -> str:
    # Asking for the reference by name keeps the report free of the warning, which it prints itself.
    is_reference = available(device)[0] == REFERENCE
    try:
        return backend_for(device, REFERENCE if is_reference else None).name
    except ValueError as error:
        raise CommandError(str(error)) from error
