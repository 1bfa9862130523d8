"""bitsandbytes' further classes of an optimizer, whose names say what is an argument of the first: bits and paging."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, ClassVar, TypeVar, cast

from opt8bit.integrations.bitsandbytes.arguments import storage
from opt8bit.integrations.reading import read
from opt8bit.optim.base import Optimizer8bit

Init = TypeVar("Init", bound=Callable[..., None])
Bare = TypeVar("Bare", bound="StandIn")


def strings_read(init: Init) -> Init:
    """Decorates an ``__init__`` that is given numbers and flags for the strings that write them.

    The Trainer hands on some arguments as strings, as do those who write for bitsandbytes.
    """

    @wraps(init)
    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        init(self, params, *map(read, args), **{name: read(value) for name, value in kwargs.items()})

    return cast("Init", __init__)


class StandIn(Optimizer8bit):
    """Gives the classes that stand in for bitsandbytes' what they have in common: how states are stored.

    Attributes:
        bits: of the states, where the name says it.
        paged: whether the name says that states are paged.
        default_bits: the default of ``optim_bits``.
    """

    bits: ClassVar[int | None] = None
    paged: ClassVar[bool] = False
    default_bits: ClassVar[int] = 32

    @property
    def optim_bits(self) -> int:
        """The bits of the states, which accelerate asks for where DeepSpeed offloads the optimizer."""
        return self.defaults["state_bits"]

    def _storage(
        self, optim_bits: Any, args: Any, min_8bit_size: int, options: Mapping[str, Any], is_paged: bool = False
    ) -> dict[str, Any]:
        """Returns options of this package; see :func:`opt8bit.integrations.bitsandbytes.arguments.storage`."""
        return storage(
            type(self).__name__,
            optim_bits,
            args,
            min_8bit_size,
            is_paged or self.paged,
            options,
            bits=self.bits,
            default_bits=self.default_bits,
        )


def variant(
    bare: type[Bare],
    bits: int | None = None,
    paged: bool = False,
    without: Collection[str] = (),
    default_bits: int = 32,
) -> type[Bare]:
    """Returns a class as ``bare``, but with bits or paging fixed and named for it, as ``PagedAdamW8bit``.

    Args:
        bare: the class that has everything as an argument.
        bits: of the states; None for an argument.
        paged: whether states are paged.
        without: arguments that the class does not have in bitsandbytes.
        default_bits: the default of ``optim_bits``, if the class has it.
    """
    default_bits = bits if bits and "optim_bits" in without else default_bits
    arguments = inspect.signature(bare).parameters.values()
    kept = [each for each in arguments if each.name not in without]
    kept = [each.replace(default=default_bits) if each.name == "optim_bits" else each for each in kept]
    signature = inspect.Signature(kept)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        options = given.pop("options", {})
        bare.__init__(self, **{"optim_bits": default_bits, **given, **options})

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = inspect.Signature([itself, *kept])  # type: ignore[attr-defined]
    name = f"{'Paged' if paged else ''}{bare.__name__}{f'{bits}bit' if bits else ''}"
    attributes = {
        "__init__": __init__,
        "__module__": bare.__module__,
        "__doc__": f"Stands in for ``bitsandbytes.optim.{name}``; see :class:`{bare.__name__}`.",
        "bits": bits,
        "paged": paged,
        "default_bits": default_bits,
    }
    return cast("type[Bare]", type(name, (bare,), attributes))
