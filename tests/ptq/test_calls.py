"""Models of no known type: what is found out about their blocks, and what is refused before anything is rounded."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from toys import token_ids

from opt8bit import ptq

WIDTH = 16


class Inner(nn.Module):
    """Adds one layer's output, or two layers', to the hidden states."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer{i}": nn.Linear(WIDTH, WIDTH) for i in range(layers)})
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        return hidden + sum(layer(x) for layer in self.layers.values())


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = self.between(block(hidden))
        return SimpleNamespace(logits=hidden)


def compress(model: nn.Module, **options: object) -> ptq.Result:
    return ptq.compress(model, token_ids(40), **{"bits": 2, "group_size": 8, **options})  # type: ignore[arg-type]


def error(model: nn.Module, result: ptq.Result) -> float:
    with torch.no_grad():
        exact = model(token_ids(40)).logits
        return float((result.compressed_model()(token_ids(40)).logits - exact).norm() / exact.norm())


def test_two_layers_that_add_share_the_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Model(*(Inner(2) for _ in range(6)))
    both = error(model, compress(model, error_propagation=1.0))
    monkeypatch.setattr("opt8bit.ptq.calls.stream_writers", lambda block, call: set())
    assert both < 0.7 * error(model, compress(model, error_propagation=1.0))


def test_hidden_states_that_change_between_blocks_are_refused() -> None:
    class Scaled(Model):
        def between(self, hidden: Tensor) -> Tensor:
            return 2 * hidden

    with pytest.raises(ValueError, match="the model changes the hidden states between its blocks 0 and 1"):
        compress(Scaled(Inner(), Inner()))


def test_weights_that_two_layers_share_are_refused() -> None:
    model = Model(Inner(), Inner())
    model.blocks[1].layers["layer0"].weight = model.blocks[0].layers["layer0"].weight  # type: ignore[index, union-attr]
    expected = r"^blocks\.1\.layers\.layer0: shares its weight with blocks\.0\.layers\.layer0"
    with pytest.raises(ValueError, match=expected):
        compress(model)
    block = Inner()
    with pytest.raises(ValueError, match=expected):
        compress(Model(block, block))


def test_a_layer_that_is_not_called_is_named_before_anything_is_rounded() -> None:
    last = Inner()
    last.extra = nn.Linear(WIDTH, WIDTH)
    seen: list[object] = []
    with pytest.raises(ValueError, match=r"^blocks\.1\.extra is called 0 times in one pass of its block"):
        compress(Model(Inner(), last), see=lambda *row: seen.append(row))
    assert not seen


def test_blocks_may_be_of_several_classes_and_are_no_bare_layers() -> None:
    class Other(Inner):
        pass

    assert len(compress(Model(Inner(), Other(2))).layers) == 3
    with pytest.raises(ValueError, match="no blocks found in Model"):
        compress(Model(nn.Linear(WIDTH, WIDTH)))


def test_the_callback_may_run_the_model() -> None:
    torch.manual_seed(0)
    model = Model(Inner(), Inner())
    result = compress(model, see=lambda *row: model(token_ids()))
    expected = compress(model)
    for name, layer in expected.layers.items():
        assert torch.equal(layer.rounded.codes, result.layers[name].rounded.codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_has_no_say(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model(Inner(), Inner())
    expected = compress(model)
    torch.set_default_dtype(dtype)
    try:
        found = compress(model)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, layer in expected.layers.items():
        assert torch.equal(layer.installed, found.layers[name].installed)


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [("gptq", None, "method must be one of opt8bit.ptq"), (ptq.GPTQ(), "int4", "grid must be one of opt8bit.quant")],
)
def test_methods_and_grids_are_no_names(method: object, grid: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ptq.compress(Model(Inner()), token_ids(), method=method, grid=grid)  # type: ignore[arg-type]


def test_one_sequence_supports_no_correction() -> None:
    with pytest.raises(ValueError, match="one sequence says nothing about how far its mean error can be trusted"):
        ptq.compress(Model(Inner()), token_ids(1), group_size=8, correct="sequential")
