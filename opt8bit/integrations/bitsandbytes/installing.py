"""Puts this package's optimizers where ``bitsandbytes.optim`` is looked up, and takes them away again."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from torch import nn

from opt8bit.integrations.bitsandbytes import optim

VERSION = "0.50.2+opt8bit"  # whose arguments the optimizers have; transformers asks for 0.46.1 or later
LACKING = "opt8bit stands in for bitsandbytes.optim only: install bitsandbytes for {name}"

_put_back: list[Callable[[], None]] = []  # undoes what is installed; empty if nothing is


def install() -> None:
    """Puts this package's optimizers where ``bitsandbytes.optim`` is looked up.

    If bitsandbytes is installed, it is imported. Its other modules stay as they are, as do optimizers that have been
    made. If it is not installed, there is a module of its name with ``optim``. Its ``nn`` has two classes of layers
    that cannot be made, for libraries that ask whether a layer is one. Every other attribute is an AttributeError that
    says to install bitsandbytes, every other module a ModuleNotFoundError.

    Call it before others write ``from bitsandbytes.optim import ...``. A second call does nothing.

    Example:
        >>> install()
        >>> import bitsandbytes
        >>> bitsandbytes.optim.AdamW8bit.__module__
        'opt8bit.integrations.bitsandbytes.optim'
        >>> uninstall()
    """
    if _put_back:
        return
    if _is_missing():
        _put_back.append(_put_modules())
    else:
        _put_back.append(_put_classes(importlib.import_module("bitsandbytes.optim")))
    _ask_again()


def uninstall() -> None:
    """Puts back what was there before :func:`install`; optimizers that have been made go on."""
    while _put_back:
        _put_back.pop()()
        _ask_again()


def _is_missing() -> bool:
    """Tells whether bitsandbytes cannot be imported: it is not installed, or something else is in its place."""
    try:
        return importlib.util.find_spec("bitsandbytes") is None
    except ValueError:  # a module without a spec, as tests put there
        return True


def _put_classes(theirs: ModuleType) -> Callable[[], None]:
    """Puts the optimizers into bitsandbytes' own module; returns what takes them out."""
    ours = {name: getattr(optim, name) for name in optim.__all__}
    before = dict(vars(theirs))
    vars(theirs).update(ours)

    def put_back() -> None:
        for name in ours:
            if name in before:
                setattr(theirs, name, before[name])
            else:
                delattr(theirs, name)

    return put_back


def _put_modules() -> Callable[[], None]:
    """Puts modules where there are none; returns what takes them away."""
    package, layers = _module("bitsandbytes"), _module("bitsandbytes.nn")
    package.__dict__.update(__version__=VERSION, __path__=[], optim=optim, nn=layers)
    layers.__dict__.update(Linear8bitLt=Linear8bitLt, Linear4bit=Linear4bit)
    modules = {"bitsandbytes": package, "bitsandbytes.nn": layers, "bitsandbytes.optim": optim}
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)

    def put_back() -> None:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)

    return put_back


def _module(name: str) -> ModuleType:
    """Returns a module that says of everything that it lacks where it is to be had."""
    module = ModuleType(name, LACKING.format(name="all else"))
    module.__spec__ = ModuleSpec(name, None, origin="opt8bit", is_package="." not in name)

    def __getattr__(attribute: str) -> NoReturn:
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}: {LACKING.format(name='it')}")

    module.__dict__["__getattr__"] = __getattr__
    return module


class _Layer(nn.Module):
    """A class of layers that cannot be made. Without it PEFT fails where it asks whether a layer is one of these."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(LACKING.format(name=f"bitsandbytes.nn.{type(self).__name__}"))


class Linear8bitLt(_Layer):
    """Stands in for a layer with weights in 8 bits."""


class Linear4bit(_Layer):
    """Stands in for a layer with weights in 4 bits."""


def _ask_again() -> None:
    """Makes transformers look again whether there is a bitsandbytes: it remembers the answer."""
    asked = sys.modules.get("transformers.utils.import_utils")
    forget = getattr(getattr(asked, "is_bitsandbytes_available", None), "cache_clear", None)
    if forget is not None:
        forget()
