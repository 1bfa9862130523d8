import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import opt8bit
from opt8bit import backends
from opt8bit.backends import native
from opt8bit.optim import lion
from opt8bit.optim.every import OPTIMIZERS
from opt8bit.quant import dynamic_map, quantize_blockwise


def test_the_fastest_serves_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = backends.available("cpu")
    assert "reference" in names and names[0] != "triton"
    monkeypatch.delenv("OPT8BIT_BACKEND", raising=False)
    assert backends.backend_for("cpu").name == names[0]
    for name in names:
        assert backends.backend_for("cpu", name).name == name
        monkeypatch.setenv("OPT8BIT_BACKEND", name)
        assert backends.backend_for("cpu").name == name
    assert backends.available("meta") == ["reference"]


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPT8BIT_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"must be one of .*reference.* on cpu, got 'abacus'"):
        backends.backend_for("cpu")


def test_kernels_and_python_define_the_same_map(kernels: str) -> None:
    lib = native.library()
    assert lib is not None
    for signed in (False, True):
        values = torch.empty(256)
        lib.opt8bit_dynamic_map(signed, values.data_ptr())
        assert torch.equal(values, dynamic_map(signed))


def test_every_rule_has_its_kernel(kernels: str) -> None:
    lack = {rule.name for kind in OPTIMIZERS for rule in kind.rules} - {*native.rules()}
    assert lack == {"muon", "muon_of_batches", "adamw_schedule_free"}  # computed by torch


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hyper": ("lr", "beta2", "beta1", "weight_decay", "maximize")}, r"hyper \('lr', 'beta2',.* 'beta1', "),
        ({"states": {"exp_avg": False}}, r"signs \(False,\), but the functor of that name has \(True,\)"),
        ({"states": {"exp_avg": True, "exp_avg_sq": False}}, r"signs \(True, False\), but .* has \(True,\)"),
        ({"whole": True}, "whole True, but the functor of that name has False"),
    ],
)
def test_a_record_that_contradicts_its_kernel_is_refused(change: dict[str, Any], expected: str, kernels: str) -> None:
    other = type("Other", (opt8bit.Lion8bit,), {"rules": (replace(lion.RULE, **change),)})
    with pytest.raises(TypeError, match=f"rule 'lion' has {expected}"):
        other([torch.nn.Parameter(torch.zeros(3))])


def test_a_rule_has_no_more_states_than_there_is_room_for() -> None:
    with pytest.raises(ValueError, match="rule 'lion' must have at most 4 states, got 5"):
        replace(lion.RULE, states=dict.fromkeys("abcde", True))


def test_threads_of_its_own_give_the_same_bits(kernels: str) -> None:
    """As with a torch that does not export its pool (before 2.10)."""
    x = torch.randn(300, 1000)
    expected = quantize_blockwise(x, dynamic_map(), 256, backend=kernels)
    lib = native.library()
    assert lib is not None
    lib.opt8bit_use_torch_threads(None)
    try:
        codes, absmax = quantize_blockwise(x, dynamic_map(), 256, backend=kernels)
    finally:
        lib.opt8bit_use_torch_threads(native.torch_parallel_for())
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


WITHOUT_KERNELS = """
import warnings
from pathlib import Path
from opt8bit.backends import native
native.LIBRARY = "no such file"
import torch, opt8bit
from opt8bit.cli.info import report
assert "not compiled" in report() and f"reference (opt8bit has no compiled kernels in {native.FOLDER}" in report()
param = torch.nn.Parameter(torch.randn(64, 64))
param.grad = torch.randn(64, 64)
optimizer = opt8bit.AdamW8bit([param])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        optimizer.step()
assert optimizer.state[param]["exp_avg_codes"].dtype == torch.uint8
assert len(caught) == 1, caught
assert caught[0].category is RuntimeWarning and "C++17 compiler" in str(caught[0].message)
"""


def test_without_kernels_the_reference_serves_with_one_warning() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], check=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the libraries of a process on Linux")
def test_kernels_bring_no_openmp_and_leave_denormals_alone(kernels: str) -> None:
    """Linking with -ffast-math would switch the whole process to flush-to-zero; two OpenMPs fight over threads."""
    code = (
        "import ctypes, pathlib, sys\n"
        f"ctypes.CDLL({str(native.FOLDER / native.LIBRARY)!r})\n"
        "assert sys.float_info.min / 2 > 0\n"
        "maps = pathlib.Path('/proc/self/maps').read_text()\n"
        "assert 'opt8bit_kernels' in maps and 'omp' not in maps\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_warning_with_kernels(kernels: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.backend_for("cpu", kernels)
