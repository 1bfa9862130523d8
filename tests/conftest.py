import os

import pytest
import torch

if not torch.cuda.is_available() and not (hasattr(torch, "xpu") and torch.xpu.is_available()):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before it is imported: kernels for GPUs run on the CPU, slowly

from opt8bit.backends import available
from opt8bit.backends.native import instruction_sets


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes a ``backend`` runs on each one of this machine, the oracle included."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available("cpu"))
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", instruction_sets() or [pytest.param("", marks=NO_KERNELS)])


NO_KERNELS = pytest.mark.skip(reason="installed without compiled kernels")
