"""Which parameters of a model Muon steps, and which AdamW: chosen by their shapes and names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

# What has two dimensions and is no matrix of a hidden layer: embeddings, heads, and norms and biases of several heads
# or experts.
ADAMW_NAMES = (
    *("*embed*", "*wte.*", "*wpe.*", "*position*", "*tokens.weight", "*_token"),
    *("*head.weight", "*classifier.weight", "*score.weight", "output.weight"),
    *("*norm*", "*bias*", "*A_log"),
)
MUON_NAMES = ("*expert*",)  # of what has three dimensions: other such weights are convolutions and position embeddings

Named = list[tuple["str | None", Tensor]]  # parameters, each with its name, if it has one


class Choice(NamedTuple):
    """How the parameters of a group are divided.

    Attributes:
        use_muon: the rule of all parameters; None where shapes and names choose.
        muon, adamw: patterns of names that choose before all else, in the manner of :mod:`fnmatch`.
        heads: the number of heads of each matrix, or numbers by the patterns that its name may fit; 1 where none does.
        embeddings: names of the parameters that belong to modules known as embeddings.
        adamw_hyper: hyper-parameters of the groups that AdamW steps, where they differ from the defaults.
    """

    use_muon: bool | None
    muon: tuple[str, ...]
    adamw: tuple[str, ...]
    heads: int | Mapping[str, int]
    embeddings: frozenset[str]
    adamw_hyper: Mapping[str, Any]

    def check(self, names: Sequence[str]) -> None:
        """
        Args:
            names: of all parameters.

        Raises:
            ValueError: a pattern fits no parameter.
        """
        heads = () if isinstance(self.heads, int) else self.heads
        for argument, patterns in (("muon", self.muon), ("adamw", self.adamw), ("heads", heads)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{argument} must have patterns that fit names of parameters, got {pattern!r}")

    def divided(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the groups that a group becomes: one for each rule and number of heads in it.

        Args:
            group: with ``params`` as :func:`listed` has them.

        Raises:
            ValueError: a parameter has no name to choose by, or fits patterns that contradict each other.
        """
        parts: dict[tuple[bool, int], Named] = {}
        for name, param in group["params"]:
            use_muon = self._asked_for(group)
            if use_muon is None:
                use_muon = self._is_for_muon(name, param)
            heads = group.get("heads", self._heads(name) if use_muon else 1)
            parts.setdefault((use_muon, heads), []).append((name, param))
        if not parts:  # a group may be empty
            parts[self._asked_for(group) is not False, group.get("heads", 1)] = []
        return [self._part(group, *key, members) for key, members in parts.items()]

    def _asked_for(self, group: Mapping[str, Any]) -> bool | None:
        """Whether Muon is to step a group; None where shapes and names choose."""
        use_muon = group.get("use_muon")
        return self.use_muon if use_muon is None else use_muon

    def _part(self, group: Mapping[str, Any], use_muon: bool, heads: int, members: Named) -> dict[str, Any]:
        names = [name for name, _ in members if name is not None]
        return {
            **({} if use_muon else self.adamw_hyper),
            **group,
            "params": [param for _, param in members],
            **({"param_names": names} if names else {}),
            "use_muon": use_muon,
            "heads": heads,
        }

    def _is_for_muon(self, name: str | None, param: Tensor) -> bool:
        if name is None:
            raise ValueError(
                "parameters are chosen by their names: give a module, its named_parameters(), or groups that say "
                f"use_muon=True or use_muon=False; got a parameter of shape {tuple(param.shape)} without a name"
            )
        is_muons, is_adamws = fits_any(name, self.muon), fits_any(name, self.adamw)
        if is_muons and is_adamws:
            raise ValueError(f"muon and adamw must not have patterns that fit the same parameter, got {name!r}")
        if is_muons or is_adamws:
            return is_muons
        if name in self.embeddings or fits_any(name, ADAMW_NAMES) or param.is_complex():
            return False
        return param.dim() == 2 or (param.dim() == 3 and fits_any(name, MUON_NAMES))

    def _heads(self, name: str | None) -> int:
        if isinstance(self.heads, int):
            return self.heads
        found = {heads for pattern, heads in self.heads.items() if name is not None and fnmatchcase(name, pattern)}
        if len(found) > 1:
            raise ValueError(f"heads must be one number for {name!r}, got {sorted(found)}")
        return found.pop() if found else 1


def fits_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def listed(group: Mapping[str, Any]) -> Named:
    """Returns the parameters of a group with their names.

    Args:
        group: its ``params`` are tensors, or pairs of a name and a tensor, or one tensor, as torch.optim takes them;
            the names of tensors may be its ``param_names``.

    Raises:
        TypeError: the parameters have no order, or are not tensors.
        ValueError: only some of them have names.
    """
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("parameters must be in an ordered collection, got a set: its order changes between runs")
    params = [params] if isinstance(params, Tensor) else list(params)
    named: Named = [(param[0], param[1]) if isinstance(param, tuple) else (None, param) for param in params]
    if "param_names" in group:
        named = [(name, param) for name, (_, param) in zip(group["param_names"], named, strict=True)]
    for _, param in named:
        if not isinstance(param, Tensor):
            raise TypeError(f"optimizer can only optimize Tensors, but one of the params is {type(param).__name__}")
    if len({name is None for name, _ in named}) > 1:
        raise ValueError("all optimizer params should be with/without names. Some param names are missing")
    return named


def embeddings_of(module: nn.Module) -> frozenset[str]:
    """Returns the names of a module's parameters that lie in embeddings, by the types of their modules."""
    inside = {
        param
        for each in module.modules()
        if isinstance(each, (nn.Embedding, nn.EmbeddingBag))
        for param in each.parameters()
    }
    return frozenset(name for name, param in module.named_parameters() if param in inside)
