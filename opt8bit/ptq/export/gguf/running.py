"""Runs a GGUF file by llama.cpp, where the package xllamacpp has it, in a process of its own: it may abort.

python -m opt8bit.ptq.export.gguf.running FILE < TOKENS
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "xllamacpp"
SECONDS = 600
SURE = 1e3  # added to the logit of the token that is chosen; the probabilities that are returned are those without it


def is_installed() -> bool:
    """Tells whether llama.cpp can be run here."""
    return importlib.util.find_spec(PACKAGE) is not None


def log_probabilities(file: Path, token_ids: Sequence[int]) -> Tensor:
    """Returns the logarithms of the probabilities of each token behind a text, float32 (tokens,), by llama.cpp.

    Args:
        file: with a tokenizer.
        token_ids: of the text.

    Raises:
        ValueError: llama.cpp does not run it.
    """
    command = [sys.executable, "-m", __spec__.name, str(file)]
    options: dict[str, Any] = {
        "input": json.dumps(list(token_ids)),
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # where this package was found
        "timeout": SECONDS,
    }
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
        return torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line.lower()]
        why = (lines or ["it has ended"])[0]
        raise ValueError(f"llama.cpp does not run {file}: {why}") from error
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        raise ValueError(f"llama.cpp does not run {file}: {error}") from error


def _run(file: str, token_ids: list[int]) -> list[float]:
    xllamacpp: Any = importlib.import_module(PACKAGE)
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = len(token_ids) + 1, 1, 0, False
    server = xllamacpp.Server(params)
    tokens = importlib.import_module("gguf").GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    # A token that is a part of a letter would be held back, with its probabilities.
    letter = next(i for i, token in enumerate(tokens) if len(token) == 1 and token.isascii())
    answer = server.handle_completions(
        {
            "prompt": token_ids,
            "n_predict": 1,
            "n_probs": len(tokens),
            "temperature": 0.0,
            "logit_bias": [[letter, SURE]],
        }
    )
    (written,) = answer["choices"][0]["logprobs"]["content"]
    found = {each["id"]: each["logprob"] for each in written["top_logprobs"]}
    return [found[i] for i in range(len(tokens))]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(sys.argv[1], json.load(sys.stdin))) + "\n")
