"""Compiles the kernels for ARM processors of 64 bits and runs their C++ test in an emulator of one."""

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def output_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which(COMPILER) or not EMULATOR,
    reason=f"takes CMake, {COMPILER} and qemu-aarch64 (Debian: g++-aarch64-linux-gnu and qemu-user)",
)
def test_neon_gives_the_bits_of_scalar(tmp_path: Path) -> None:
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")
    output_of("cmake", "-S", str(KERNELS), "-B", str(tmp_path), *target, "-DOPT8BIT_TESTS=ON")
    output_of("cmake", "--build", str(tmp_path), "--parallel", "2")
    loader = output_of(COMPILER, "-print-file-name=ld-linux-aarch64.so.1").strip()
    libraries = Path(loader).resolve().parents[1]  # where the emulator finds /lib
    printed = output_of(str(EMULATOR), "-L", str(libraries), str(tmp_path / "test_kernels"))
    assert printed.split("\n")[:2] == ["neon: ok", "scalar: ok"]
