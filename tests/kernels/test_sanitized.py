"""Builds the kernels with address and undefined-behaviour sanitizers and runs their C++ test."""

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++")),
    reason="takes CMake and a C++ compiler",
)
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(KERNELS), "-B", str(tmp_path), "-DOPT8BIT_SANITIZE=ON"]
    for command in (
        configure,
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
        [str(tmp_path / "test_kernels")],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "scalar: ok" in result.stdout
