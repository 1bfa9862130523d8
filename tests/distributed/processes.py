"""Starts several processes that are one training, as torchrun does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

SECONDS = 240  # at most; a few suffice


def end() -> None:
    """Ends a process when all have come here. Not by the interpreter's end: meshes hold on to groups, whose threads may
    fall over it."""
    torch.distributed.barrier()
    os._exit(0)


def run(script: str, ranks: int, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder in so many processes on this machine; none is left behind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*command, str(Path(__file__).parent / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if check:
        assert process.returncode == 0, output
    return subprocess.CompletedProcess(process.args, process.returncode, output, None)
