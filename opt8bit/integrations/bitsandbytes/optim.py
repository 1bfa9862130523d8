"""Optimizers with the names, arguments and defaults of ``bitsandbytes.optim`` 0.50, and the steps of this package.

All take the options of this package, too, and two arguments that bitsandbytes had before: ``block_wise=True`` and
``percentile_clipping=100``. An argument that bitsandbytes takes and ignores (``amsgrad``, ``nesterov``, ``dampening``,
``bias_correction``, RMSprop's ``momentum``) is honoured here.
"""

from __future__ import annotations

from typing import Any

from opt8bit.integrations.bitsandbytes.arguments import of_args
from opt8bit.integrations.bitsandbytes.manager import GlobalOptimManager
from opt8bit.integrations.bitsandbytes.variants import StandIn, strings_read, variant
from opt8bit.optim import adagrad, adam, ademamix, lamb, lars, lion, rmsprop, sgd

Betas = Any  # numbers, or a string that writes them: bitsandbytes reads "(0.9, 0.999)", too


class Adam(StandIn, adam.Adam8bit):
    """Stands in for ``bitsandbytes.optim.Adam``, which decays weights as AdamW does."""

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        stored = self._storage(optim_bits, args, min_8bit_size, options, is_paged)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **stored)


class AdamW(StandIn, adam.AdamW8bit):
    """Stands in for ``bitsandbytes.optim.AdamW``."""

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        stored = self._storage(optim_bits, args, min_8bit_size, options, is_paged)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **stored)


class Lion(StandIn, lion.Lion8bit):
    """Stands in for ``bitsandbytes.optim.Lion``, whose weight decay is decoupled with all bits since 0.50."""

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        stored = self._storage(optim_bits, args, min_8bit_size, options, is_paged)
        super().__init__(params, lr, betas, weight_decay, **stored)


class AdEMAMix(StandIn, ademamix.AdEMAMix8bit):
    """Stands in for ``bitsandbytes.optim.AdEMAMix``."""

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        stored = self._storage(optim_bits, None, min_8bit_size, options, is_paged)
        super().__init__(params, lr, betas, alpha, t_alpha or 0, t_beta3 or 0, eps, weight_decay, **stored)


class SGD(StandIn, sgd.SGD8bit):
    """Stands in for ``bitsandbytes.optim.SGD``; without momentum, too, which bitsandbytes refuses."""

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        stored = self._storage(optim_bits, args, min_8bit_size, options)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **stored)


class RMSprop(StandIn, rmsprop.RMSprop8bit):
    """Stands in for ``bitsandbytes.optim.RMSprop``; centered, too, which bitsandbytes refuses."""

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        stored = self._storage(optim_bits, args, min_8bit_size, options)
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, **stored)


class Adagrad(StandIn, adagrad.Adagrad8bit):
    """Stands in for ``bitsandbytes.optim.Adagrad``; with a decay of the rate and a first sum, which that refuses."""

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        stored = self._storage(optim_bits, args, min_8bit_size, options)
        super().__init__(params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, **stored)


class LAMB(StandIn, lamb.LAMB8bit):
    """Stands in for ``bitsandbytes.optim.LAMB`` by the LAMB of the paper.

    bitsandbytes' steps are AdamW's, with 32 bits made shorter where their norm is above ``max_unorm`` times that of the
    parameter. Here 1.0 takes the paper's trust ratio, 0.0 none; other values are refused.
    """

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Any,
    ) -> None:
        name, said = type(self).__name__, of_args(args)
        norm = said.pop("max_unorm", max_unorm)
        if norm not in (0.0, 1.0):
            raise ValueError(f"{name}: max_unorm must be 1.0 for the trust ratio or 0.0 for none, got {norm!r}")
        if amsgrad is not False:
            raise ValueError(f"{name}: amsgrad must be False, got {amsgrad!r}. AdamW has it")
        if adam_w_mode is not True:
            raise ValueError(
                f"{name}: adam_w_mode must be True, got {adam_w_mode!r}. The paper's decay is no L2 penalty"
            )
        stored = self._storage(optim_bits, said, min_8bit_size, options)
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, norm == 1.0, **stored)


class LARS(StandIn, lars.LARS8bit):
    """Stands in for ``bitsandbytes.optim.LARS`` by the LARS of the paper.

    ``max_unorm`` is its trust coefficient; 0.0 takes none. bitsandbytes makes steps shorter where their norm is above
    ``max_unorm`` times that of the parameter, with 32 bits only.
    """

    @strings_read
    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        **options: Any,
    ) -> None:
        said = of_args(args)
        norm = said.pop("max_unorm", max_unorm)
        if dampening != 0:
            raise ValueError(f"{type(self).__name__}: dampening must be 0, got {dampening!r}. SGD has it")
        stored = self._storage(optim_bits, said, min_8bit_size, options)
        super().__init__(params, lr, momentum, weight_decay, norm, nesterov=nesterov, adapt=norm != 0, **stored)


BITS, PAGED = ("optim_bits",), ("is_paged",)  # arguments that some classes with more in their name lack

Adam8bit, Adam32bit = variant(Adam, 8), variant(Adam, 32)
PagedAdam, PagedAdam8bit, PagedAdam32bit = (variant(Adam, bits, True) for bits in (None, 8, 32))
AdamW8bit, AdamW32bit = variant(AdamW, 8), variant(AdamW, 32)
PagedAdamW, PagedAdamW8bit, PagedAdamW32bit = (variant(AdamW, bits, True, PAGED) for bits in (None, 8, 32))
Lion8bit, Lion32bit = variant(Lion, 8, without=BITS), variant(Lion, 32, without=BITS)
PagedLion = variant(Lion, None, True, PAGED)
PagedLion8bit, PagedLion32bit = (variant(Lion, bits, True, BITS + PAGED) for bits in (8, 32))
AdEMAMix8bit, AdEMAMix32bit = variant(AdEMAMix, 8, without=BITS), variant(AdEMAMix, 32, without=BITS)
PagedAdEMAMix = variant(AdEMAMix, None, True, PAGED)
PagedAdEMAMix8bit, PagedAdEMAMix32bit = (variant(AdEMAMix, bits, True, BITS + PAGED) for bits in (8, 32))
SGD8bit, SGD32bit = variant(SGD, 8, without=BITS), variant(SGD, 32, without=BITS)
RMSprop8bit, RMSprop32bit = variant(RMSprop, 8, without=BITS), variant(RMSprop, 32, without=BITS)
Adagrad8bit, Adagrad32bit = variant(Adagrad, 8, default_bits=8), variant(Adagrad, 32)
LAMB8bit, LAMB32bit = variant(LAMB, 8, without=BITS), variant(LAMB, 32, without=BITS)
LARS8bit, LARS32bit = variant(LARS, 8, without=BITS), variant(LARS, 32, without=BITS)

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
]
