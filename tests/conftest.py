import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available() and not (hasattr(torch, "xpu") and torch.xpu.is_available()):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before it is imported: kernels for GPUs run on the CPU, slowly

from opt8bit.backends import available
from opt8bit.backends.native import instruction_sets


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors take longer to divide among threads than to step, and MKL's sums depend on how they are divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes a ``backend`` runs on each one of this machine, the oracle included."""
    if "backend" in metafunc.fixturenames:
        marks = [pytest.mark.slow] if metafunc.definition.get_closest_marker("slow_interpreted") else []
        backends = [pytest.param(name, marks=marks if name == "triton" else ()) for name in available("cpu")]
        metafunc.parametrize("backend", backends)
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", instruction_sets() or [pytest.param("", marks=NO_KERNELS)])


NO_KERNELS = pytest.mark.skip(reason="installed without compiled kernels")
