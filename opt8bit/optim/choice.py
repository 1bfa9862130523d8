"""Chooses by shapes and names which parameters of a model Muon steps, and which AdamW."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

# What has two dimensions and is no matrix of a hidden layer: embeddings, heads, and norms and biases of several heads
# or experts.
ADAMW_NAMES = (
    *("*embed*", "*wte.*", "*wpe.*", "*position*", "*tokens.weight", "*_token"),
    *("*head.weight", "*classifier.weight", "*score.weight"),
    *("*norm*", "*bias*", "*A_log"),
)
# Heads, too, but in hidden layers, where it is the projection behind attention or of an MLP.
OUTPUT_NAMES = ("output.weight", "*.output.weight")
HIDDEN_NAMES = ("[0-9]*.*", "*.[0-9]*.*", "*att*", "*mlp*", "*ffn*")
MUON_NAMES = ("*expert*",)  # of what has three dimensions: other such weights are convolutions and position embeddings
# What DataParallel, torch.compile, FSDP1, checkpoint_wrapper and PEFT put into the names of parameters.
WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|modules_to_save\.[^.]+)\."
)

Named = list[tuple["str | None", Tensor]]  # parameters, each with its name, if it has one


class Choice(NamedTuple):
    """Divides the parameters of a group.

    Attributes:
        use_muon: the rule of all parameters that no pattern fits; None where shapes and names choose.
        muon, adamw: patterns of names that choose before all else, in the manner of :mod:`fnmatch`.
        heads: the number of heads of each matrix, or numbers by the patterns that its name may fit; 1 where none does.
        vocabulary: names of the parameters that their modules show to be embeddings or output heads.
        adamw_hyper: hyper-parameters of the groups that AdamW steps, where they differ from the defaults.
    """

    use_muon: bool | None
    muon: tuple[str, ...]
    adamw: tuple[str, ...]
    heads: int | Mapping[str, int]
    vocabulary: frozenset[str]
    adamw_hyper: Mapping[str, Any]

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            groups: all of them, with ``params`` as :func:`listed_group` has them.

        Raises:
            ValueError: a pattern fits no parameter, or one of heads none that Muon steps; or there are heads, and Muon
                steps nothing.
        """
        names = [name for group in groups for name, _ in group["params"] if name is not None]
        _check_patterns("muon", self.muon, names)
        _check_patterns("adamw", self.adamw, names)
        _check_heads(self.heads, [name for group in groups for name in self._names_of_muon(group)])
        if self.heads != 1 and not any(self._is_for_muon(group, *each) for group in groups for each in group["params"]):
            raise ValueError(f"heads must be 1 where AdamW steps all parameters, got {self.heads!r}")

    def divided(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the groups that a group becomes: one for each rule and number of heads in it.

        Args:
            group: with ``params`` as :func:`listed_group` has them. Its ``heads`` are a number, or numbers by patterns.

        Raises:
            ValueError: a parameter has no name to choose by, or fits patterns that contradict each other or the group.
        """
        if "heads" in group:
            _check_heads(group["heads"], self._names_of_muon(group))
        heads = group.get("heads", self.heads)
        is_contradictory = "heads" in group and group.get("use_muon") is False  # which check_group refuses
        parts: dict[tuple[bool, int], Named] = {}
        for name, param in group["params"]:
            use_muon = self._is_for_muon(group, name, param)
            number = _heads_of(name, heads) if use_muon or is_contradictory else 1
            parts.setdefault((use_muon, number), []).append((name, param))
        if not parts:  # a group may be empty
            parts[self._asked_for(group) is not False, _heads_of(None, heads)] = []
        return [self._part(group, *key, members) for key, members in parts.items()]

    def _names_of_muon(self, group: Mapping[str, Any]) -> list[str]:
        members = group["params"]
        return [name for name, param in members if name is not None and self._is_for_muon(group, name, param)]

    def _asked_for(self, group: Mapping[str, Any]) -> bool | None:
        """Returns whether Muon is to step a group, or None where shapes and names choose."""
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

    def _is_for_muon(self, group: Mapping[str, Any], name: str | None, param: Tensor) -> bool:
        asked = group.get("use_muon")
        by_pattern = None if name is None else self._by_pattern(name)
        if by_pattern is not None:
            if asked not in (None, by_pattern):
                argument = "muon" if by_pattern else "adamw"
                raise ValueError(f"{argument} must not fit {name!r}, whose group says use_muon={asked!r}")
            return by_pattern
        asked = self._asked_for(group)
        return self._is_chosen(name, param) if asked is None else asked

    def _by_pattern(self, name: str) -> bool | None:
        is_muons, is_adamws = fits_any(name, self.muon), fits_any(name, self.adamw)
        if is_muons and is_adamws:
            raise ValueError(f"muon and adamw must not have patterns that fit the same parameter, got {name!r}")
        return is_muons if is_muons or is_adamws else None

    def _is_chosen(self, name: str | None, param: Tensor) -> bool:
        """Tells whether names and shapes choose Muon."""
        if name is None:
            raise ValueError(
                "parameters are chosen by their names: give a module, its named_parameters(), or groups that say "
                f"use_muon=True or use_muon=False; got a parameter of shape {tuple(param.shape)} without a name"
            )
        is_output = fits_any(name, OUTPUT_NAMES) and not fits_any(name, HIDDEN_NAMES)
        if is_output or name in self.vocabulary or fits_any(name, ADAMW_NAMES) or param.is_complex():
            return False
        return param.dim() == 2 or (param.dim() == 3 and fits_any(name, MUON_NAMES))


def is_heads(value: object) -> bool:
    """Tells whether a value is a number of heads."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_heads(heads: Any, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: it is neither a number nor numbers by patterns, or a pattern fits none of the names.
    """
    numbers = heads.values() if isinstance(heads, Mapping) else [heads]
    if not all(map(is_heads, numbers)):
        raise ValueError(f"heads must be a positive integer, or such integers by patterns of names, got {heads!r}")
    if isinstance(heads, Mapping):
        _check_patterns("heads", heads, names, of="parameters that Muon steps")


def _check_patterns(argument: str, patterns: Iterable[str], names: Sequence[str], of: str = "parameters") -> None:
    for pattern in patterns:
        if not any(fits_any(name, [pattern]) for name in names):
            raise ValueError(f"{argument} must have patterns that fit names of {of}, got {pattern!r}")


def _heads_of(name: str | None, heads: int | Mapping[str, int]) -> int:
    if isinstance(heads, int):
        return heads
    found = {number for pattern, number in heads.items() if name is not None and fits_any(name, [pattern])}
    if len(found) > 1:
        raise ValueError(f"heads must be one number for {name!r}, got {sorted(found)}")
    return found.pop() if found else 1


def fits_any(name: str, patterns: Iterable[str]) -> bool:
    """Tells whether a name fits one of the patterns: as it is, or without what wrappers of modules have put into it."""
    names = {name, WRAPPERS.sub("", name)}
    return any(fnmatchcase(each, pattern) for pattern in patterns for each in names)


def listed_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group whose ``params`` are pairs of a name, or None, and a tensor.

    Args:
        group: its ``params`` are tensors, or pairs of a name and a tensor, or one tensor, as torch.optim takes them;
            the names of tensors may be its ``param_names``.

    Raises:
        TypeError: the group is no dict, the parameters have no order or are not tensors, or a name is not a string.
        ValueError: only some of them have names, or ``param_names`` are not as many.
    """
    if not isinstance(group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(group)}")
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("parameters must be in an ordered collection, got a set: its order changes between runs")
    params = [params] if isinstance(params, Tensor) else list(params)
    named: Named = [(param[0], param[1]) if isinstance(param, tuple) else (None, param) for param in params]
    if "param_names" in group:
        names = list(group["param_names"])
        if len(names) != len(named):
            raise ValueError(f"param_names must be as many as params, got {len(names)} for {len(named)}")
        named = [(name, param) for name, (_, param) in zip(names, named, strict=True)]
    for name, param in named:
        if not isinstance(name, (str, type(None))):
            raise TypeError(f"names of parameters must be strings, got {name!r}")
        if not isinstance(param, Tensor):
            raise TypeError(f"optimizer can only optimize Tensors, but one of the params is {type(param).__name__}")
    if len({name is None for name, _ in named}) > 1:
        raise ValueError("all optimizer params should be with/without names. Some param names are missing")
    return {**group, "params": named}


def vocabulary_of(module: nn.Module) -> frozenset[str]:
    """Returns the names of a module's embeddings, known by their types, and of the output heads, known by their shapes.

    A head is the only ``nn.Linear`` whose weight has the shape of an embedding's. Where there are several, they are
    taken for hidden layers that happen to be of the size of a position embedding.
    """
    embeddings = [each for each in module.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))]
    inside = {param for each in embeddings for param in each.parameters()}
    shapes = {each.weight.shape for each in embeddings}
    alike = {each.weight for each in module.modules() if isinstance(each, nn.Linear) and each.weight.shape in shapes}
    counts = Counter(weight.shape for weight in alike)
    inside |= {weight for weight in alike if counts[weight.shape] == 1}
    return frozenset(name for name, param in module.named_parameters() if param in inside)
