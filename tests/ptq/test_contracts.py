"""What is not as an extension must be is refused by the names of the layer and the class."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.activations.per_tensor import StaticPerTensor
from opt8bit.ptq.activations.quantizer import InputQuantizer, calibrated, with_quantized_inputs
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.export.dense import Dense
from opt8bit.ptq.model.folding import Link
from opt8bit.ptq.reconstruction.engine import Reconstruction
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.rounding.rounder import Rounder
from opt8bit.ptq.transforms.transform import Transform, checked_scale
from opt8bit.quant.contract import check_grid
from opt8bit.quant.uniform import UniformGrid, UniformParams
from opt8bit.quant.weight import Outliers, Part, QuantizedWeight, WeightScheme
from opt8bit.recipe.registry import FORMATS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FIRST = "model.layers.0.self_attn.q_proj"


def compress(**options: Any) -> ptq.Result:
    return ptq.compress(MODELS["llama"](), token_ids(4, 8), **{"bits": 3, "group_size": 16, **options})


@dataclass(frozen=True)
class Wrong(Rounder):
    """Rounds to nearest, and then spoils what comes of it."""

    spoil: Callable[[QuantizedWeight], Any]
    rowwise = False

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> Any:
        return self.spoil(ptq.RTN().round(weight, statistics, scheme))


def parts(change: Callable[[Part], Part]) -> Callable[[QuantizedWeight], QuantizedWeight]:
    return lambda rounded: replace(rounded, parts=tuple(map(change, rounded.parts)))


def with_outlier(rounded: QuantizedWeight) -> QuantizedWeight:
    first = torch.tensor([0])
    return replace(rounded, outliers=Outliers(first, first, torch.tensor([5.0])))


SPOILED: list[tuple[Callable[[QuantizedWeight], Any], str]] = [
    (lambda rounded: None, "Wrong.round must return a QuantizedWeight, got NoneType"),
    (QuantizedWeight.dequantize, "Wrong.round must return a QuantizedWeight, got Tensor"),
    (lambda rounded: rounded.rows_from(0, 5), "Wrong.round must return a weight of shape (32, 32), got (5, 32)"),
    (lambda rounded: rounded.rows_from(0, 1), "Wrong.round must return a weight of shape (32, 32), got (1, 32)"),
    (
        lambda rounded: replace(rounded.rows_from(0, 1), shape=(32, 32)),
        "Wrong.round must return codes as torch.uint8 (32, 32), got torch.uint8 (1, 32)",
    ),
    (
        parts(lambda part: replace(part, codes=part.codes.long())),
        "Wrong.round must return codes as torch.uint8 (32, 32), got torch.int64 (32, 32)",
    ),
    (
        parts(lambda part: replace(part, params=part.params._replace(scale=part.params.scale[:1]))),
        "Wrong.round must return scale as (32, groups), got (1, 2)",
    ),
    (parts(lambda part: replace(part, params=tuple(part.params))), "must return params as UniformParams, got tuple"),
    (
        parts(lambda part: replace(part, grid=UniformGrid(8))),
        "Wrong.grids must name the grid of each part, (UniformGrid(8",
    ),
    (lambda rounded: replace(rounded, parts=()), "Wrong.grids must name the grid of each part, (), got"),
    (with_outlier, "Wrong.round returned outliers: its keeps_outliers must be True, got False"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED, ids=[message for _, message in SPOILED])
@pytest.mark.parametrize("polished", [False, True])
def test_what_a_method_returns(spoil: Callable[[QuantizedWeight], Any], message: str, polished: bool) -> None:
    method: Rounder = Wrong(spoil)
    if polished:
        method = ptq.QuantEase(start=method)
    with pytest.raises((TypeError, ValueError), match=re.escape(FIRST) + ": .*" + re.escape(message)):
        compress(method=method)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (["second_moments"], "Needing.needs must be a frozenset of some of second_moments, got ['second_moments']"),
        ("second_moments", "Needing.needs must be a frozenset of some of second_moments, got 'second_moments'"),
        (frozenset({"second_moment"}), "Needing.needs may have second_moments, got 'second_moment'"),
    ],
    ids=str,
)
def test_what_a_method_needs(needs: Any, message: str) -> None:
    kind: Any = type("Needing", (Wrong,), {"needs": needs})
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        compress(method=kind(lambda rounded: rounded))


class Even(UniformGrid):
    """Evenly spaced values, to be spoiled."""


def fitted(change: Callable[[UniformParams], Any]) -> Callable[..., Any]:
    return lambda grid, block, importance=None: change(UniformGrid.fit(grid, block, importance))


class Bare(UniformGrid):
    def __init__(self) -> None:
        self._bits, self.symmetric, self.range = 4, False, "minmax"


WRONG_GRIDS: list[tuple[dict[str, Any], str]] = [
    (
        {"fit": fitted(lambda params: UniformParams(*(part[..., 0] for part in params)))},
        "Even.fit, scale, must return (2",
    ),
    ({"fit": fitted(tuple)}, "Even.fit must return UniformParams, got tuple"),
    ({"fit": fitted(lambda params: params.scale)}, "Even.fit must return UniformParams, got Tensor"),
    ({"fit": fitted(lambda params: None)}, "Even.fit must return UniformParams, got NoneType"),
    ({"fit": fitted(lambda params: UniformParams(1.0, 0.0))}, "Even.fit, scale, must return a tensor, got float"),  # type: ignore[arg-type]
    ({"fit": lambda grid, block: UniformGrid.fit(grid, block)}, "2 positional arguments but 3 were given"),
    ({"encode": lambda grid, x, params: UniformGrid.encode(grid, x, params)[..., :1]}, "Even.encode must return (2"),
    (
        {"encode": lambda grid, x, params: UniformGrid.encode(grid, x, params).long()},
        "Even.encode must return torch.uint8",
    ),
    (
        {"encode": lambda grid, x, params: UniformGrid.encode(grid, x, params) + 16},
        "Even.encode must return codes below 16",
    ),
    ({"decode": lambda grid, codes, params: None}, "Even.decode must return a tensor, got NoneType"),
    ({"nearest": lambda grid, x, params: x}, "Even.nearest must be decode(encode(x)), differs by "),
    ({"stored_bits": lambda grid, codes, params: None}, "Even.stored_bits must return an integer from 0, got None"),
    ({"stored_bits": lambda grid, codes, params: -1}, "Even.stored_bits must return an integer from 0, got -1"),
    ({"bits": 0}, "Even.bits must be 1 to 8, got 0"),
    ({"bits": 9}, "Even.bits must be 1 to 8, got 9"),
    ({"params_type": None}, "Even.params_type must be a NamedTuple of tensors, got None"),
    ({"__init__": lambda grid, bits: Bare.__init__(grid)}, "Even.__init__ must call super().__init__()"),
]


@pytest.mark.parametrize(("spoiled", "message"), WRONG_GRIDS, ids=[message for _, message in WRONG_GRIDS])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_a_grid_does(spoiled: dict[str, Any], message: str, method: str) -> None:
    grid: Any = type("Even", (UniformGrid,), spoiled)(4)
    seen: list[str] = []
    with pytest.raises((TypeError, ValueError), match=re.escape(FIRST) + ": .*" + re.escape(message)):
        compress(bits=4, grid=grid, method=method, see=lambda report, layers: seen.append(report.name))
    assert not seen
    with pytest.raises((TypeError, ValueError), match=f"model.layers.1.mlp.down_proj: .*{re.escape(message)}"):
        compress(overrides={"*.1.mlp.down_proj": {"grid": grid, "method": method}})


def test_a_grid_is_tried_without_a_change_to_the_weight() -> None:
    class InPlace(UniformGrid):
        def encode(self, x: Tensor, params: UniformParams) -> Tensor:
            return super().encode(x.mul_(1), params)

        def nearest(self, x: Tensor, params: UniformParams) -> Tensor:
            found = super().nearest(x, params)
            x.zero_()
            return found

    block = torch.randn(2, 3, 8)
    given = block.clone()
    check_grid(InPlace(4), block)
    assert torch.equal(block, given)


@dataclass(frozen=True)
class Scaled(Transform):
    """Multiplies every channel by what a function of their number returns."""

    by: Callable[[int], Any]

    def scale(self, block: nn.Module, link: Link) -> Any:
        producer: Any = block.get_submodule(link.producer)
        return self.by(len(producer.weight))


WRONG_SCALES: list[tuple[Callable[[int], Any], str]] = [
    (lambda n: torch.ones(n - 1), "Scaled.scale must return (32,), got (31,)"),
    (lambda n: torch.tensor([2.0]), "Scaled.scale must return (32,), got (1,)"),
    (lambda n: torch.tensor(2.0), "Scaled.scale must return (32,), got ()"),
    (lambda n: torch.ones(n, 1), "Scaled.scale must return (32,), got (32, 1)"),
    (lambda n: 2.0, "Scaled.scale must return a tensor (32,), or None, got float"),
    (lambda n: [1.0] * n, "Scaled.scale must return a tensor (32,), or None, got list"),
    (torch.zeros, "Scaled.scale must be finite and not 0 for this link, got 0.0"),
    (lambda n: torch.full((n,), torch.inf), "Scaled.scale must be finite and not 0 for this link, got inf"),
    (lambda n: torch.full((n,), torch.nan), "Scaled.scale must be finite and not 0 for this link, got nan"),
]


@pytest.mark.parametrize(("by", "message"), WRONG_SCALES, ids=[message for _, message in WRONG_SCALES])
def test_what_a_transform_returns(by: Callable[[int], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(f"model.layers.0.input_layernorm: {message}")):
        compress(transforms=(Scaled(by),))


def test_a_transform_leaves_the_block_to_others() -> None:
    @dataclass(frozen=True)
    class Doubling(Transform):
        def scale(self, block: nn.Module, link: Link) -> Tensor | None:
            next(block.parameters()).mul_(2)
            return None

    with pytest.raises(ValueError, match=r"layers\.0\.input_layernorm: Doubling\.scale must leave the block as it is"):
        compress(transforms=(Doubling(),))


def test_a_link_that_takes_no_negative_factor_gets_none() -> None:
    link = Link("first", ("second",), torch.arange(4), negative=False)
    negative = -torch.ones(4)
    with pytest.raises(ValueError, match=r"Scaled\.scale must be finite and above 0 for this link, got -1\.0"):
        checked_scale(Scaled(torch.ones), link, negative, 4)
    assert checked_scale(Scaled(torch.ones), link._replace(negative=True), negative, 4) is negative


class Rows(TrainedWeight):
    """One factor for each output, to be spoiled."""

    def __init__(self, rounded: QuantizedWeight) -> None:
        super().__init__()
        self.rounded, self.logarithms = rounded, nn.Parameter(torch.zeros(rounded.shape[0], 1))

    def weight(self, progress: float) -> Tensor:
        return self._scaled().dequantize()

    def harden(self) -> QuantizedWeight:
        return self._scaled()

    def _scaled(self) -> QuantizedWeight:
        (part,) = self.rounded.parts
        params = part.params._replace(scale=part.params.scale * self.logarithms.exp())
        return replace(self.rounded, parts=(replace(part, params=params),))


@dataclass(frozen=True)
class TrainRows(Parametrization):
    make: Callable[[QuantizedWeight], Any]
    lr: float = 1e-2

    def start(self, weight: Tensor, rounded: QuantizedWeight) -> Any:
        weight.zero_()  # a copy, to do with as one likes
        return self.make(rounded)


def spoiled(**methods: Any) -> Callable[[QuantizedWeight], Any]:
    return type("Rows", (Rows,), methods)


def without_parameters(rounded: QuantizedWeight) -> TrainedWeight:
    return Rows(rounded).requires_grad_(False)


WRONG_TRAINING: list[tuple[Callable[[QuantizedWeight], Any], str]] = [
    (lambda rounded: None, "q_proj: TrainRows.start must return a TrainedWeight, got NoneType"),
    (without_parameters, "q_proj: Rows must have parameters to train, as nn.Parameter, got none"),
    (
        spoiled(weight=lambda self, progress: Rows.weight(self, progress).detach()),
        "q_proj: Rows.weight must depend on its parameters, got a weight without gradient",
    ),
    (
        spoiled(weight=lambda self, progress: Rows.weight(self, progress)[:1]),
        "q_proj: Rows.weight must return (32, 32), got (1, 32)",
    ),
    (
        spoiled(weight=lambda self, progress: Rows.weight(self, progress) * torch.nan),
        "q_proj: Rows.weight must return finite numbers, got 1024 others",
    ),
    (spoiled(penalty=lambda self, progress: None), "q_proj: Rows.penalty must return a number, got NoneType"),
    (
        spoiled(penalty=lambda self, progress: self.weight(progress).abs()),
        "q_proj: Rows.penalty must return a number, got (32, 32)",
    ),
    (
        spoiled(harden=lambda self: self.weight(1.0).detach()),
        "q_proj: Rows.harden must return a QuantizedWeight, got Tensor",
    ),
    (
        spoiled(harden=lambda self: self._scaled().by_row(lambda part: part + 1)),
        "q_proj: Rows.harden().dequantize() must be weight(1.0), differs by up to ",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG_TRAINING, ids=[message for _, message in WRONG_TRAINING])
def test_what_a_parametrization_returns(make: Callable[[QuantizedWeight], Any], message: str) -> None:
    engine = Reconstruction(TrainRows(make), steps=2)
    with pytest.raises((TypeError, ValueError), match=r"model\.layers\.0\..*" + re.escape(message)):
        compress(method="rtn", reconstruction=engine)


def test_training_does_not_change_the_model_that_was_given() -> None:
    model = MODELS["llama"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ptq.compress(model, token_ids(4, 8), bits=3, group_size=16, reconstruction=Reconstruction(TrainRows(Rows), steps=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_that_diverges_is_said() -> None:
    late = spoiled(penalty=lambda self, progress: self.logarithms.sum() * (torch.nan if progress else 1.0))
    with pytest.warns(UserWarning, match=r"2 steps of training .*q_proj.* had no finite loss and gradient$"):
        result = compress(method="rtn", reconstruction=Reconstruction(TrainRows(late), steps=3))
    assert all(bool(change.dequantize().isfinite().all()) for change in result.changes.values())  # type: ignore[union-attr]


def test_an_engine_takes_a_parametrization() -> None:
    wrong: Any = TrainScales
    with pytest.raises(TypeError, match=r"parametrization must be one, such as TrainScales\(\), got <class"):
        Reconstruction(wrong)
    with pytest.raises(ValueError, match=r"TrainRows\.lr must be a positive number, got 0\.0"):
        Reconstruction(TrainRows(Rows, lr=0.0))


WRONG_TENSORS: list[tuple[Any, str]] = [
    (
        {"codes": torch.ones(2)},
        "Packed.tensors must return its parts, weight_codes, weight_scale, at least the first, got codes",
    ),
    ({}, "Packed.tensors must return its parts, weight_codes, weight_scale, at least the first, got nothing"),
    (None, "Packed.tensors must return tensors by name, got None"),
    ({"weight_codes": [1]}, "Packed.tensors must return tensors by name, got {'weight_codes': [1]}"),
    (
        {"weight_codes": torch.ones(2), "weight_scale": torch.tensor([torch.nan])},
        "Packed.tensors, weight_scale, must be finite",
    ),
]


class Packed(Dense):
    parts, is_packed = ("weight_codes", "weight_scale"), True

    def __init__(self, tensors: Any, header: Any) -> None:
        self._tensors, self._header = tensors, header

    def tensors(self, weight: QuantizedWeight, module: nn.Module) -> Any:
        return self._tensors

    def quantization(self, result: ptq.Result) -> Any:
        return self._header


@pytest.fixture(scope="module")
def result() -> ptq.Result:
    return compress(method="rtn")


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Any:
    registered: Any = FORMATS
    monkeypatch.setattr(registered, "_found", {})
    return FORMATS


@pytest.mark.parametrize(("tensors", "message"), WRONG_TENSORS, ids=[message for _, message in WRONG_TENSORS])
def test_what_a_format_writes(tensors: Any, message: str, result: ptq.Result, formats: Any, tmp_path: Any) -> None:
    formats.register("packed", Packed(tensors, {"quant_method": "packed"}))
    with pytest.raises((TypeError, ValueError), match=re.escape(f"{FIRST}: ") + ".*" + re.escape(message)):
        ptq.export(result, tmp_path / "out", format="packed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("header", [None, {"bits": 8}, {"quant_method": "gptq"}], ids=str)
def test_what_a_formats_header_says(header: Any, result: ptq.Result, formats: Any, tmp_path: Any) -> None:
    formats.register("packed", Packed({}, header))
    message = "Packed.quantization must have the format's name in FORMATS as quant_method, got "
    with pytest.raises(ValueError, match=re.escape(f"{message}{header}")):
        ptq.export(result, tmp_path / "out", format="packed")
    assert not list(tmp_path.iterdir())


def test_what_is_calibrated_is_named() -> None:
    model, ids = MODELS["llama"](), token_ids(2, 8)
    batches = [{"input_ids": ids}]
    for wrong in ([ids], ids):
        with pytest.raises(TypeError, match=r"^batches must be mappings for model\(\*\*batch\), .*, got a Tensor$"):
            calibrated(model, wrong, StaticPerTensor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer has seen an input: batches must have one at least"):
        calibrated(model, [], StaticPerTensor)
    for make in (StaticPerTensor(), lambda: None, "static"):
        with pytest.raises(TypeError, match=f"{FIRST}: make must be called to make an InputQuantizer"):
            calibrated(model, batches, make)  # type: ignore[arg-type]
    model.model.layers[0].input_layernorm.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=f"{FIRST}: an input is not finite"):
        calibrated(model, batches, StaticPerTensor)


def test_ranges_that_float32_cannot_hold_are_refused() -> None:
    for symmetric in (False, True):
        quantizer = StaticPerTensor(symmetric=symmetric)
        with pytest.raises(ValueError, match=r"inputs from -3e\+38 to 1e\+38 are too large for a range in float32"):
            quantizer.observe(torch.tensor([-3e38, 1e38]))
        quantizer.observe(torch.tensor([-1e38, 1.6e38]))
        assert bool(quantizer(torch.tensor([0.0, 1e38, -3e38])).isfinite().all())


class Spoiling(InputQuantizer):
    def observe(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :4]


def test_quantizers_stay_the_callers_own() -> None:
    model, ids = MODELS["llama"](), token_ids(2, 8)
    quantizers = calibrated(model, [{"input_ids": ids}], StaticPerTensor)
    quantized: Any = with_quantized_inputs(model, quantizers)
    with torch.no_grad():
        expected = quantized(ids).logits
        for quantizer in quantizers.values():
            quantizer.observe(torch.tensor([-100.0, 100.0]))
        assert torch.equal(quantized(ids).logits, expected)
    with pytest.raises(ValueError, match=r"the model's blocks have no layer 'nope'; there is model\.layers\.0"):
        with_quantized_inputs(model, {"nope": StaticPerTensor()})
    with pytest.raises(TypeError, match=rf"{FIRST}: quantizers must be InputQuantizers, got 3"):
        with_quantized_inputs(model, {FIRST: 3})  # type: ignore[dict-item]
    spoiled: Any = with_quantized_inputs(model, {FIRST: Spoiling()})
    with pytest.raises(ValueError, match=re.escape(f"{FIRST}: Spoiling.forward must return (2, 8, 32), got (2, 8, 4)")):
        spoiled(ids)
