import os
from collections import Counter
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported: more threads than cores wait for each other
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

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


@pytest.hookimpl(tryfirst=True)  # before slow ones are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's cases, one in so many as ``sampled`` says is always run. The others are slow ones."""
    cases: Counter[str] = Counter()
    for item in items:
        sampled, test = item.get_closest_marker("sampled"), item.nodeid.partition("[")[0]
        if sampled is None or item.get_closest_marker("slow"):
            continue
        if cases[test] % sampled.args[0]:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1


NO_KERNELS = pytest.mark.skip(reason="installed without compiled kernels")
