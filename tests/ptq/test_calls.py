"""Models of no known type: what is found out about their blocks, and what is refused before anything is rounded."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from toys import assert_same_changes, token_ids

from opt8bit import ptq
from opt8bit.ptq.calibration.statistics import Inputs
from opt8bit.ptq.correction.target import asymmetric_target
from opt8bit.ptq.model.anatomy import apart
from opt8bit.ptq.plan import LayerPlan
from opt8bit.ptq.stage import compress_stage
from opt8bit.quant import UniformGrid

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
    monkeypatch.setattr("opt8bit.ptq.model.anatomy.stream_writers", lambda block, call: set())
    assert both < 0.7 * error(model, compress(model, error_propagation=1.0))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("aWb", ["a", "W", "b"]),
        ("Wab", ["W", "ab"]),
        ("abW", ["ab", "W"]),
        ("WV", ["W", "V"]),
        ("ab", ["ab"]),
    ],
)
def test_layers_that_add_have_stages_of_their_own(names: str, expected: list[str]) -> None:
    found = apart([list(names), ["c"]], {"W", "V"})
    assert found == [*map(list, expected), ["c"]]


def test_what_a_layer_that_adds_puts_out_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count, forward = [0], nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        count[0] += 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    counts = []
    for strength in (0.0, 0.5):
        count[0] = 0
        compress(Model(Inner(2), Inner()), error_propagation=strength, batch_size=2)
        counts.append(count[0])
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)],
)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_where_the_streams_agree_the_target_is_the_weight(
    strength: float, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever half precision makes of the output and of a large bias in it."""
    found: list[tuple[Tensor, Tensor]] = []

    def watched(weight: Tensor, *args: object) -> Tensor:
        found.append((weight, asymmetric_target(weight, *args)))  # type: ignore[arg-type]
        return found[-1][1]

    monkeypatch.setattr("opt8bit.ptq.stage.asymmetric_target", watched)
    model = Model(Inner())
    model.blocks[0].layers["layer0"].bias.data.fill_(8.0)  # type: ignore[index, union-attr]
    compress(model.to(dtype), error_propagation=strength)
    [(weight, target)] = found
    assert (target - weight).norm() < tolerance * weight.norm()


@pytest.mark.parametrize("correct", ["none", "joint"])
def test_the_target_of_a_layer_that_adds_is_the_best_guess_of_what_it_should_put_out(
    correct: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []

    def watched(weight: Tensor, missing: Tensor, hessian: Tensor, strength: float) -> Tensor:
        found.append(asymmetric_target(weight, missing, hessian, strength, 1e-12))
        return found[0]

    monkeypatch.setattr("opt8bit.ptq.stage.asymmetric_target", watched)
    generator = torch.Generator().manual_seed(0)
    x_hat = torch.randn(6, 20, WIDTH, generator=generator, dtype=torch.float64) + 1
    wanted = x_hat[..., :5].square() + x_hat[..., 5:10]
    layer = nn.Linear(WIDTH, 5).double()
    plan = LayerPlan(ptq.GPTQ(), ptq.WeightScheme(UniformGrid(2), 8), 1.0, correct)
    corrected = {"layer"} if correct == "joint" else set[str]()
    compress_stage({"layer": layer}, [Inputs(x_hat + 1, x_hat, None, wanted)], plan, corrected)
    inputs, outputs = x_hat.flatten(0, 1), wanted.flatten(0, 1)
    if correct == "joint":
        inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    torch.testing.assert_close(found[0], torch.linalg.lstsq(inputs, outputs).solution.T, rtol=1e-6, atol=1e-6)


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


def test_layers_whose_calls_say_nothing_stay_as_they_are_and_are_named_before_anything_is_rounded() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.tanh()

    class Odd(Inner):
        def __init__(self) -> None:
            super().__init__(2)
            self.extra, self.twice = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.last, self.router = nn.Linear(WIDTH, WIDTH), Router(WIDTH, WIDTH)

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = super().forward(self.twice(self.twice(hidden)))
            return hidden + self.last(hidden[:, -1:]) + self.router(hidden)[1]

    seen: list[object] = []
    expected = (
        r"^layers that stay as they are \(4\): blocks\.1\.extra is not called; blocks\.1\.twice is called 2 times; "
        r"blocks\.1\.last sees 1 vectors of 8 tokens; blocks\.1\.router returns no tensor$"
    )
    with pytest.warns(UserWarning, match=expected):
        result = compress(Model(Inner(), Odd()), see=lambda *row: seen.append(row))
    assert sorted(row.name for row in result.report) == [
        f"blocks.{name}" for name in ("0.layers.layer0", "1.layers.layer0", "1.layers.layer1")
    ]
    assert [total for _, total in seen] == [3, 3, 3]  # type: ignore[misc]
    left = {"blocks.1.extra": None, "blocks.1.twice": None, "blocks.1.last": None, "blocks.1.router": None}
    assert compress(Model(Inner(), Odd()), overrides=left).changes.keys() == result.changes.keys()


def test_a_layer_that_is_not_called_in_any_block_is_named_once() -> None:
    def odd() -> Inner:
        block = Inner()
        block.extra = nn.Linear(WIDTH, WIDTH)
        return block

    with pytest.warns(UserWarning, match=r"^layers that stay as they are \(2\): blocks\.\*\.extra is not called$"):
        compress(Model(odd(), odd()))


def test_where_nothing_can_be_compressed_that_is_said() -> None:
    class Idle(Inner):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + 1

    with pytest.raises(
        ValueError, match=r"^no layer of the blocks can be compressed: blocks\.0\.layers\.layer0 is not"
    ):
        compress(Model(Idle()))


def test_blocks_may_be_of_several_classes_and_are_no_bare_layers() -> None:
    class Other(Inner):
        pass

    assert len(compress(Model(Inner(), Other(2))).changes) == 3
    with pytest.raises(ValueError, match="no blocks found in Model"):
        compress(Model(nn.Linear(WIDTH, WIDTH)))


def test_the_callback_may_run_the_model() -> None:
    torch.manual_seed(0)
    model = Model(Inner(), Inner())
    result = compress(model, see=lambda *row: model(token_ids()))
    expected = compress(model)
    assert_same_changes(result, expected)


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
    assert_same_changes(found, expected)


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [
        (ptq.GPTQ, None, "method must be one of opt8bit.ptq"),
        (ptq.GPTQ(), 4, "grid must be a name, or one of opt8bit.quant"),
    ],
)
def test_methods_and_grids_are_what_they_should_be(method: object, grid: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ptq.compress(Model(Inner()), token_ids(), method=method, grid=grid)  # type: ignore[arg-type]


def test_one_sequence_supports_no_correction() -> None:
    with pytest.raises(ValueError, match="one sequence says nothing about how far its mean error can be trusted"):
        ptq.compress(Model(Inner()), token_ids(1), group_size=8, bias_correction="sequential")
