"""Who adds an optimizer is told here what else wants its name."""

import inspect
from numbers import Real
from pathlib import Path

import pytest
import torch
from cases import CASES, MUON, rule_of

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.every import OPTIMIZERS
from opt8bit.optim.ruled import RULES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_is_exported_described_and_tested(kind: type[Optimizer8bit]) -> None:
    name = kind.__name__
    assert getattr(opt8bit, name) is getattr(opt8bit.optim, name) is kind
    assert name in opt8bit.__all__ and name in opt8bit.optim.__all__
    assert f"`{name}`" in (ROOT / "README.md").read_text()
    assert kind in {type(case.ours([{"params": []}], **case.hyper)) for case in (*CASES.values(), *MUON.values())}


def test_every_rule_has_a_case() -> None:
    chosen = {rule_of(case) for case in (*CASES.values(), *MUON.values())}
    assert chosen == {rule.name for kind in OPTIMIZERS for rule in kind.rules}
    assert chosen <= RULES.keys()


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_hyper_parameters_of_another_kind_are_refused_by_name(kind: type[Optimizer8bit]) -> None:
    """As where a configuration writes 1e-3, which YAML reads as a string."""
    matrix = torch.nn.Parameter(torch.zeros(64, 64))
    for name, argument in inspect.signature(kind).parameters.items():
        default = argument.default
        wrong: list[object] = []
        if isinstance(default, Real) and not isinstance(default, bool):
            wrong = ["1e-3", [1e-3]]
        elif isinstance(default, tuple) and default:
            wrong = ["0.9, 0.999", 0.9, dict.fromkeys(default), tuple(map(str, default)), default[1:]]
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{name.removeprefix('adamw_')}\b.* must be .*, got "):
                kind([("matrix", matrix)], **{name: value})  # type: ignore[arg-type]
