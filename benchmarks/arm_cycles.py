"""How many cycles an ARM processor takes for an AdamW step of 8-bit states, by llvm-mca's model of it.

That is decoding both moments, the rule on float32 parameters, and encoding both, by the kernels of
``kernels/simd/neon.h``. No ARM processor is measured: the model knows instructions and units, but neither caches nor
memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")  # CMakeLists.txt's
REGION = re.compile(r"Code Region - (\w+) (\d+)\n.*?Iterations: +(\d+)\n.*?Total Cycles: +(\d+)\n", re.DOTALL)


def output_of(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def cycles(assembly: Path, analyzer: str, processor: str) -> dict[str, float]:
    """Returns the cycles per element of each marked loop."""
    options = ("-mtriple=aarch64-linux-gnu", f"-mcpu={processor}", "-iterations=200")
    text = output_of(analyzer, *options, str(assembly))
    return {name: int(total) / int(count) / int(elements) for name, elements, count, total in REGION.findall(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--analyzer", default="llvm-mca", help="16 or later: earlier ones have no model of Neoverse")
    parser.add_argument("--processors", nargs="+", default=["neoverse-n2", "neoverse-v2", "apple-m1"])
    arguments = parser.parse_args()
    versions = [output_of(arguments.compiler, "--version").splitlines()[0]]
    versions += re.findall(r"LLVM version \S+", output_of(arguments.analyzer, "--version"))
    print(", ".join(versions))
    with tempfile.TemporaryDirectory() as folder:
        assembly = Path(folder) / "arm_cycles.s"
        source = ROOT / "benchmarks" / "arm_cycles.cpp"
        output_of(arguments.compiler, *FLAGS, f"-I{ROOT / 'kernels'}", "-S", str(source), "-o", str(assembly))
        for processor in arguments.processors:
            found = cycles(assembly, arguments.analyzer, processor)
            row = {name: round(number, 2) for name, number in {**found, "step": sum(found.values())}.items()}
            print(json.dumps({"processor": processor, "cycles_per_element": row}))


if __name__ == "__main__":
    main()
