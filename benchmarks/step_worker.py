"""Steps a peer in a process of its own, for peers whose packages cannot be imported beside others.

    python step_worker.py SETTINGS

SETTINGS is JSON: module and class of the optimizer, shapes and dtype of its parameters, threads. Each line that is read
takes one step, and its seconds are printed; first of all, where the module is. Started by :class:`peers.Elsewhere`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from measuring import parameters, seconds


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    module = importlib.import_module(settings["module"])
    print(Path(str(module.__file__)).resolve(), flush=True)
    params = parameters(settings["shapes"], getattr(torch, settings["dtype"]))
    optimizer = getattr(module, settings["class"])(params, lr=1e-3)
    for _ in sys.stdin:
        print(seconds(optimizer.step), flush=True)


if __name__ == "__main__":
    main()
