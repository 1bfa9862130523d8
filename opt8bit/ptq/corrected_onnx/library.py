"""The packages onnx and onnxruntime, which an extra brings and nothing else here needs."""

from __future__ import annotations

import importlib
from typing import Any


def onnx() -> Any:
    """
    Raises:
        ImportError: it is not installed. The message says how to install it.
    """
    return _imported("onnx")


def onnxruntime() -> Any:
    """
    Raises:
        ImportError: it is not installed. The message says how to install it.
    """
    return _imported("onnxruntime")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{error.name or name} is missing: pip install "opt8bit[onnx]"') from error
