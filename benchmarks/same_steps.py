"""Do two builds take the same steps, bit for bit?

    python benchmarks/same_steps.py OLD NEW [--backends NAME ...]

OLD and NEW are Python interpreters that have a build each, or folders that hold its package ``opt8bit``, for the
interpreter that runs this. Both train small parameters by every rule, dtype and rounding, in 8 bits and in 32, with
every backend of the machine, Triton's interpreter included; parameters and states after 20 steps are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builds import started_as

CASES = Path(__file__).parents[1] / "tests" / "optim"  # the table of the tests says what is compared
STEPS, STEPS_INTERPRETED = 20, 3
SHAPES = ((32, 300), (5,), (4, 64, 20), (17, 256), (300, 16), (0, 3), ())
FORMS: dict[str, dict[str, Any]] = {  # of a parameter and its states, with the options that make them
    "float32": {"dtype": "float32"},
    "float32, 32 bits": {"dtype": "float32", "state_bits": 32},
    "float32, scaled": {"dtype": "float32", "scaled": True, "fused": True},
    "float32, channels_last": {"dtype": "float32", "channels_last": True},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, stochastic": {"dtype": "bfloat16", "stochastic_rounding": True, "seed": 7},
    "bfloat16, compensated": {"dtype": "bfloat16", "compensation": True},
}


def digest(
    make: Callable[..., Any], hyper: dict[str, Any], form: dict[str, Any], steps: int, *, is_of_matrices: bool
) -> str:
    """Trains with the build of this process; returns a hash of parameters and states, or what was refused."""
    import torch

    options = {key: value for key, value in form.items() if key not in ("dtype", "scaled", "channels_last")}
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in SHAPES if len(shape) == 2] if is_of_matrices else list(SHAPES)
    if form.get("channels_last"):
        shapes = [(8, 20, 5, 5), (3, 300, 4, 4)]
    powers = torch.tensor([2.0**k for k in range(-8, 8)])  # exp has other bits in some processes
    params = []
    for shape in shapes:
        data = torch.randn(shape, generator=generator).to(getattr(torch, form["dtype"]))
        if form.get("channels_last"):
            data = data.to(memory_format=torch.channels_last)
        params.append(torch.nn.Parameter(data))
    try:
        optimizer = make(params, **{"lr": 0.01, "min_8bit_size": 0, **hyper, **options})
        for _ in range(steps):
            for param in params:
                sizes = powers[torch.randint(len(powers), param.shape, generator=generator)]
                param.grad = (torch.randn(param.shape, generator=generator) * sizes).to(param)
            if form.get("scaled"):
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            optimizer.step()
    except (TypeError, ValueError) as error:
        return f"refused: {error}"
    found = hashlib.sha256()
    for param in params:
        for value in (param.detach(), *optimizer.state[param].values()):
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def work() -> None:
    """Prints what comes of every case with the build of this process."""
    import warnings

    sys.path.insert(0, f"{CASES}")
    from cases import CASES as OF_ANY_SHAPE  # pyright: ignore[reportMissingImports]
    from cases import MUON  # pyright: ignore[reportMissingImports]

    warnings.simplefilter("ignore")
    steps = STEPS_INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else STEPS
    for name, case in {**OF_ANY_SHAPE, **MUON}.items():
        for form_name, form in FORMS.items():
            found = digest(case.ours, case.hyper, form, steps, is_of_matrices=name in MUON)
            print(json.dumps([name, form_name, found]), flush=True)


def results(place: Path, backend: str) -> dict[tuple[str, ...], str]:
    """What a build's steps come to with a backend, by case."""
    interpreted = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    python, environment = started_as(place, OPT8BIT_BACKEND=backend, **interpreted)
    output = subprocess.run([python, __file__, "--work"], env=environment, text=True, stdout=subprocess.PIPE).stdout
    return {tuple(row[:2]): row[2] for row in map(json.loads, output.splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="Python interpreter, or folder with a package")
    parser.add_argument("new", type=Path, metavar="NEW", help="likewise")
    every = ("avx512", "avx2", "scalar", "reference", "triton")
    parser.add_argument("--backends", nargs="+", default=every, metavar="NAME", help="what OPT8BIT_BACKEND names")
    options = parser.parse_args()
    different = 0
    for backend in options.backends:
        old, new = (results(place, backend) for place in (options.old, options.new))
        changed = [case for case in old.keys() | new.keys() if old.get(case) != new.get(case)]
        refused = sum(value.startswith("refused") for value in new.values())
        print(f"{backend:<10}{len(new):>4} cases, {len(changed)} differ; both refuse {refused}", flush=True)
        for case in sorted(changed):
            print(f"    {', '.join(case)}: {old.get(case, 'nothing')[:60]} -> {new.get(case, 'nothing')[:60]}")
        different += len(changed) + (not new)
    sys.exit(different > 0)


if __name__ == "__main__":
    work() if sys.argv[1:2] == ["--work"] else main()
