#!/usr/bin/env bash
# Sourced by every script beside it, with the packages to install as arguments: makes a temporary folder with a virtual
# environment, and removes both at the end. `finding` runs the Python program on its standard input there, on the CPU.
# What the packages write to standard error is shown only if the program fails.
set -euo pipefail
unset PYTHONPATH PYTHONWARNINGS
export PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir temporary
export TMPDIR="$folder/temporary" HF_HOME="$folder/hub" HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=""
python3 -m venv environment
environment/bin/python -m pip install -q "$@" 2>errors || { cat errors >&2; exit 1; }
environment/bin/python - "$@" <<'PYTHON'
import platform
import sys
from importlib.metadata import version

names = [requirement.partition("==")[0] for requirement in sys.argv[1:]]
print("versions:", f"Python {platform.python_version()},", ", ".join(f"{name} {version(name)}" for name in names))
PYTHON

finding() {
    cat >finding.py
    environment/bin/python finding.py 2>errors || { cat errors >&2; return 1; }
}
