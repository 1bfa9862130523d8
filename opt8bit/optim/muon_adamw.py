"""Muon for the matrices of hidden layers and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from opt8bit.backends import Rule
from opt8bit.optim.adam import ADAMW, check_adam
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.choice import Choice, is_heads, listed_group, vocabulary_of
from opt8bit.optim.muon import RULE_OF_BATCHES, check_muon
from opt8bit.optim.options import Options, check_betas, check_finite, check_flags

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MuonAdamW8bit(Optimizer8bit):
    """Implements Muon for the matrices of hidden layers and AdamW for everything else, with 8-bit states.

    Each parameter group has one rule, ``use_muon``: that of :class:`Muon8bit` or that of :class:`AdamW8bit`. A group
    that does not say which is divided by names and shapes. In this order:

    1. What fits a pattern of ``muon`` or ``adamw`` is stepped by that rule.
    2. Embeddings, heads, norms and biases are stepped by AdamW. All are known by the names in
       ``opt8bit.optim.choice``, such as ``*embed*`` and ``*head.weight``. Given a module, embeddings are known by its
       type, too, and a head by its shape: it is the only ``nn.Linear`` with that of an embedding.
    3. Matrices are stepped by Muon, and so are batches of matrices, (batch, rows, columns), whose name has "expert".
    4. All else is stepped by AdamW.

    Names are compared as they are, and without what DataParallel, torch.compile, FSDP1 and PEFT put into them. A group
    that says ``use_muon`` is refused where a pattern says otherwise.

    ``print`` shows each group with its rule and the names of its parameters. Schedulers see the ``lr`` of each group.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64))
        >>> optimizer = MuonAdamW8bit(model, lr=1e-3)
        >>> [(group["use_muon"], group["param_names"]) for group in optimizer.param_groups]
        [(False, ['0.weight', '1.bias']), (True, ['1.weight'])]

    Args:
        params: a module, its named parameters, or parameter groups. Groups of parameters without names say
            ``use_muon``.
        lr: learning rate, a float or a tensor of one element.
        weight_decay: decay of a parameter per step, in units of lr.
        momentum: decay rate of Muon's buffer.
        nesterov: whether Muon looks ahead by one step.
        ns_coefficients: of the Newton-Schulz polynomial.
        eps: least norm that Muon divides a matrix by.
        ns_steps: Newton-Schulz iterations, less than 100.
        adjust_lr_fn: how lr follows the shape of a matrix, as for :class:`Muon8bit`. The default, "match_rms_adamw",
            moves the elements of a matrix about as far as AdamW does, so that one lr serves both.
        betas: decay rates of AdamW's first and second moment, each in [0, 1).
        heads: matrices that the rows of a matrix consist of, each orthogonalized for itself: for projections to the
            queries, keys and values of attention. A number for all that Muon steps, or numbers by patterns of names.
        use_muon: True or False for all parameters that neither a group nor a pattern decides; None to choose by name
            and shape.
        muon: patterns of names that Muon steps, in the manner of :mod:`fnmatch`.
        adamw: patterns of names that AdamW steps.
        adamw_lr: learning rate of AdamW; None for ``lr``.
        adamw_weight_decay: weight decay of AdamW; None for ``weight_decay``.
        adamw_eps: added to AdamW's denominator.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter of either rule is out of range; a pattern fits no parameter; a parameter without
            a name is to be chosen by it; or one that Muon is to step is not a matrix or a batch of them, or has no
            such heads.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Muon: An optimizer for hidden layers in neural networks; Muon
    is Scalable for LLM Training.
    """

    rules = (RULE_OF_BATCHES, ADAMW)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        heads: int | Mapping[str, int] = 1,
        use_muon: bool | None = None,
        muon: Sequence[str] = (),
        adamw: Sequence[str] = (),
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | None = None,
        adamw_eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": betas,
            "heads": 1,
            "use_muon": use_muon is not False,
        }
        given = {"lr": adamw_lr, "weight_decay": adamw_weight_decay, "eps": adamw_eps}
        self._choice = Choice(
            use_muon=use_muon,
            muon=_patterns("muon", muon),
            adamw=_patterns("adamw", adamw),
            heads=heads,
            vocabulary=vocabulary_of(params) if isinstance(params, nn.Module) else frozenset(),
            adamw_hyper={name: value for name, value in given.items() if value is not None},
        )
        of_muon = {**defaults, "use_muon": True, "fused": None}
        of_adamw = {**defaults, **self._choice.adamw_hyper, "use_muon": False}
        for group in (of_adamw, of_muon) if use_muon is False else (of_muon, of_adamw):
            _check_hyper(group)
        super().__init__(self._listed(params), defaults, options)

    def _listed(self, params: Any) -> Any:
        """Returns the groups that were given, their parameters with names, after all patterns have been checked."""
        if isinstance(params, Tensor):
            return params  # which torch.optim refuses
        params = list(params.named_parameters() if isinstance(params, nn.Module) else params)
        if not params:
            return params  # which it refuses, too
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        groups = [listed_group(group) for group in groups]
        self._choice.check(groups)
        return groups

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_choice": self._choice}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch.optim does; one that does not say ``use_muon`` is divided as the others were.

        Raises:
            ValueError: an option has a value it cannot have, or a parameter cannot be stepped by the rule chosen.
            TypeError: a parameter is of a dtype that cannot be optimized, or a DTensor whose shards cannot be.
        """
        count = len(self.param_groups)
        try:
            for group in self._choice.divided(listed_group(param_group)):
                super().add_param_group(group)
        except Exception:
            del self.param_groups[count:]  # all of it, or nothing
            raise

    def rule(self, group: dict[str, Any]) -> Rule:
        return RULE_OF_BATCHES if group["use_muon"] else ADAMW

    def check_group(self, group: dict[str, Any]) -> None:
        check_flags(group, "use_muon")
        heads = group["heads"]
        if not is_heads(heads):
            raise ValueError(f"heads must be a positive integer, got {heads!r}")
        _check_hyper(group)
        if heads != 1 and not group["use_muon"]:
            raise ValueError(f"heads must be 1 in a group that AdamW steps, got {heads}")

    def check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        if not group["use_muon"]:
            return
        shape, heads = tuple(param.shape), group["heads"]
        if param.dim() not in (2, 3) or param.is_complex():
            raise ValueError(
                "Muon takes matrices of real numbers, and batches of them in three dimensions; leave to AdamW "
                f"(adamw=[NAME], or use_muon=False in a group) a parameter of shape {shape} and {param.dtype}"
            )
        if heads > 1 and (param.dim() == 3 or len(param) % heads):
            raise ValueError(f"heads must divide the rows of a matrix, got {heads} for a parameter of shape {shape}")


def _check_hyper(group: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: a hyper-parameter is one that the group's rule cannot have.
    """
    check_finite(group, "lr", "weight_decay", "momentum", "eps")
    check_betas(group["betas"])
    check = check_muon if group["use_muon"] else check_adam
    check(group)


def _patterns(argument: str, value: Sequence[str]) -> tuple[str, ...]:
    """
    Raises:
        ValueError: they are not several strings.
    """
    is_several = isinstance(value, (Sequence, Set)) and not isinstance(value, str)
    if not is_several or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{argument} must be a list of patterns of names, got {value!r}")
    return tuple(value)
