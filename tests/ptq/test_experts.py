"""Experts that are linear layers of their own: each sees the tokens that are routed to it."""

import warnings
from typing import Any

import pytest
import torch
from test_calls import WIDTH, Model
from torch import Tensor, nn
from toys import quantized, token_ids

from opt8bit import ptq
from opt8bit.ptq import block as blockwise
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.rounding import RTN
from opt8bit.ptq.routed import LEAST, are_enough
from opt8bit.quant import UniformGrid
from opt8bit.quant.weight import QuantizedWeight, WeightScheme

IDS = token_ids(40)
TOKENS = IDS.numel()


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).tanh() * self.up(x))


class Sparse(nn.Module):
    """Sends every token to one expert, by the signs of some features; the last expert has those of a single token id.

    Args:
        experts: how many; one more than the signs tell gets no token.
    """

    def __init__(self, experts: int = 4, backwards: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.backwards = backwards

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.before(self.norm(hidden))
        x = self.norm(hidden).flatten(0, 1)
        number = (x[:, 0] > 0).long() + (x[:, 1] > 1.8).long()
        output = torch.zeros_like(x)
        for i in number.unique().tolist()[:: -1 if self.backwards else 1]:
            rows = (number == i).nonzero().flatten()
            output.index_add_(0, rows, self.experts[i](x[rows]))
        return hidden + self.after(output.reshape(hidden.shape))


def compress(model: nn.Module, **options: Any) -> ptq.Result:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layers that saw too few tokens")
        return ptq.compress(model, IDS, **{"bits": 3, "group_size": 8, "batch_size": 4, **options})


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Sparse(), Sparse())


@pytest.mark.parametrize("correct", ["none", "sequential", "joint", "local"])
@pytest.mark.parametrize("backwards", [False, True])
def test_all_experts_are_compressed_and_the_model_runs_as_it_was_calibrated(correct: str, backwards: bool) -> None:
    torch.manual_seed(0)
    model = Model(Sparse(backwards=backwards), Sparse(backwards=backwards))
    result = compress(model, bias_correction=correct)
    assert 2 * (2 + 4 * 3) == len(result.report) == len({row.name for row in result.report})
    assert {f"{row.name}.weight" for row in result.report} <= result.changes.keys()
    assert result.probe is not None
    with torch.no_grad():
        found = result.compressed_model()(IDS[:1]).logits[0, -4:]
    torch.testing.assert_close(found, result.probe.logits, rtol=1e-4, atol=1e-5)


def test_experts_with_enough_tokens_are_rounded_on_what_they_see_in_the_compressed_model(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[list[Tensor], int]] = {}
    compress_routed = blockwise.compress_routed

    def watched(layers: Any, x_hat: Any, tokens: int, *others: Any) -> Any:
        seen[f"{len(seen)}.{next(iter(layers))}"] = ([x.clone() for x in x_hat], tokens)
        return compress_routed(layers, x_hat, tokens, *others)

    monkeypatch.setattr(blockwise, "compress_routed", watched)
    result = compress(model)
    names = [name.partition(".")[2] for name in seen]
    # In the order of their numbers, those that no pass has called last; gates and ups together.
    assert names == [f"experts.{i}.{own}" for _ in range(2) for i in range(4) for own in ("gate", "down")]
    inputs: dict[str, list[Tensor]] = {}
    rounded = result.compressed_model()
    for name, layer in rounded.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, *, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in IDS.split(4):
            rounded(batch)
    for number, (key, (x_hat, tokens)) in enumerate(seen.items()):
        expected = inputs.get(f"blocks.{number // 8}.{key.partition('.')[2]}", [])
        assert tokens == sum(len(x) for x in expected)
        for x, y in zip(x_hat, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def codes(weight: QuantizedWeight) -> Tensor:
    return weight.parts[0].codes


def test_experts_with_few_tokens_are_rounded_to_nearest_and_named(model: Model) -> None:
    with pytest.warns(UserWarning, match="layers that saw too few tokens for statistics") as told:
        result = ptq.compress(model, IDS, bits=3, group_size=8)
    message = str(told[0].message)
    nearest = WeightScheme(UniformGrid(3, range="minmax"), 8)
    names = [row.name for row in result.report if ".experts.3." in row.name]
    assert len(names) == 6 and "blocks.0.experts.3.gate (0)" in message
    for name in names:
        weight = matrix(model.get_submodule(name))
        assert torch.equal(codes(quantized(result, name)), codes(RTN().round(weight, InputStatistics(), nearest)))
        assert quantized(result, name).parts[0].grid is result.plan.of(name).scheme.grid  # type: ignore[union-attr]
    for row in result.report:
        assert 0 < row.error_rounded < 0.2
    others = [row.name for row in result.report if ".experts.0." in row.name]
    assert not any(name in message for name in others)
    for name in others:
        weight = matrix(model.get_submodule(name))
        assert not torch.equal(codes(quantized(result, name)), codes(RTN().round(weight, InputStatistics(), nearest)))


def test_few_tokens_are_fewer_than_features() -> None:
    assert LEAST == 1.0
    assert are_enough(64, 64) and not are_enough(63, 64)


def test_statistics_of_experts_are_worth_having(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        with torch.no_grad():
            exact = model(IDS).logits
            rounded = compress(model, overrides={"*.before": None, "*.after": None}).compressed_model()
            return float((rounded(IDS).logits - exact).norm() / exact.norm())

    ours = error()
    monkeypatch.setattr("opt8bit.ptq.routed.are_enough", lambda tokens, features: False)
    assert ours < 0.9 * error()


@pytest.mark.parametrize("statistic", ["mean", "median", "position"])
def test_experts_are_corrected_by_what_they_see(model: Model, statistic: str) -> None:
    result = compress(model, bias_correction="sequential", statistic=statistic, bits=2)
    rows = {row.name: row for row in result.report}
    expert, dense = rows["blocks.0.experts.0.down"], rows["blocks.0.after"]
    assert dense.bias_norm > 0 and not dense.note
    if statistic == "position":
        assert not expert.bias_norm and expert.note == "it sees only some of the tokens"
    else:
        assert expert.bias_norm > 0 and expert.error_corrected < expert.error_rounded
    none = rows["blocks.0.experts.3.down"]
    assert not none.bias_norm and none.note == "it sees only some of the tokens"


def test_a_list_whose_members_all_see_all_tokens_has_no_experts() -> None:
    class Dense(Sparse):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + sum(expert(self.norm(hidden)) for expert in self.experts)

    model = Model(Dense(), Dense())
    with pytest.warns(UserWarning, match=r"\(4\): blocks\.\*\.before is not called; blocks\.\*\.after is not called"):
        result = ptq.compress(model, IDS, bits=3, group_size=8)
    assert len(result.changes) == 24
