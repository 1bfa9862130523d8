"""Exported models: their layers become modules again, compute the same, and are corrected."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opt8bit import ptq

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export's own
NAMES = ["stem", "blocks.0.0", "blocks.1", "head"]


class Net(nn.Module):
    """Grouped, transposed and one-dimensional layers, some of them nested, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ReLU()), nn.ConvTranspose2d(8, 8, 2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


def images(seed: int, count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.5


def exported(model: nn.Module, *args: Any) -> Any:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model.eval(), args, dynamic_shapes=({0: batch},)).module()


def test_layers_become_modules_and_compute_the_same() -> None:
    model = Net()
    graph = exported(model, images(0))
    found: Any = ptq.with_modules(graph)
    with torch.no_grad():
        for x in (images(1), images(2, 4)):
            assert torch.equal(found(x), model(x)) and torch.equal(graph(x), model(x))
        for name in NAMES:
            layer, before = found.get_submodule(name), model.get_submodule(name)
            x = torch.randn(2, 8) if name == "head" else torch.randn(2, 3 if name == "stem" else 8, 6, 6)
            assert torch.equal(layer(x), before(x))
    assert found.state_dict().keys() == model.state_dict().keys()
    assert not isinstance(graph.get_submodule("stem"), torch.fx.GraphModule)  # it was a copy


class Mixing(nn.Module):
    """Takes a weight from its input, by way of many sums: each doubles the ways back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = x
        for _ in range(60):
            weight = weight + weight.sin()
        return nn.functional.linear(self.head(x), weight)


def test_each_operator_behind_a_weight_is_looked_at_once() -> None:
    model = Mixing().eval()
    x = torch.randn(4, 4)
    found = ptq.with_modules(torch.export.export(model, (x,)).module())  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert isinstance(found.head, torch.fx.GraphModule)


@pytest.mark.parametrize("order", ["local", "sequential"])
def test_an_exported_model_that_was_rounded_is_corrected(order: str) -> None:
    model, found = Net(), ptq.with_modules(exported(Net(), images(0)))
    with torch.no_grad():
        for name in NAMES:
            weight: Any = found.get_submodule(name).weight
            weight.copy_((weight / weight.abs().max() * 3).round() * weight.abs().max() / 3)
    data = [images(seed) for seed in range(4)]
    check(model, found, data, order)


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    """What the first layer and the last one put out."""
    seen: list[Tensor] = []
    layers = [model.get_submodule(name) for name in ("stem", "head")]
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def check(model: Any, found: Any, data: list[Tensor], order: str) -> None:
    """The mean error of the first layer, and in sequence of the last one, is gone."""
    x = torch.cat(data)

    def errors() -> tuple[float, float]:
        first, last = (y - y_hat for y, y_hat in zip(outputs(model, x), outputs(found, x), strict=True))
        if order == "local":  # it sees the float model's inputs, which another operator rounds
            first = model.stem(x) - found.get_submodule("stem")(x)
        return float(last.mean(0).norm()), float(first.mean((0, 2, 3)).norm())

    with torch.no_grad():
        before = errors()
        correction = ptq.correct(found, model, data, order=order, shrink=False)
        after = errors()
        assert [module.name for module in correction.modules] == NAMES
        assert after[1] < 1e-3 * before[1] and after[0] < (1e-3 if order == "sequential" else 1) * before[0]
        correction.undo()
        assert errors() == before


@pytest.mark.parametrize("order", ["local", "sequential"])
def test_pt2e(order: str) -> None:
    """Static activations in 8 bits, weights with a scale for each tensor."""
    pytest.importorskip("torchao")
    package: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    quantizers: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = quantizers.X86InductorQuantizer().set_global(quantizers.get_default_x86_inductor_quantization_config())
    prepared = package.prepare_pt2e(exported(Net(), images(0)), quantizer)
    for seed in range(4):
        prepared(images(seed))
    found: Any = ptq.with_modules(package.convert_pt2e(prepared))
    check(Net(), found, [images(seed) for seed in range(4)], order)


def test_what_is_no_exported_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be an exported one, a torch.fx.GraphModule, got Linear"):
        ptq.with_modules(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its graph names none"):
        ptq.with_modules(exported(nn.ReLU(), torch.randn(4, 2)))
    with pytest.raises(ValueError, match="its graph names none"):
        ptq.with_modules(torch.fx.symbolic_trace(Net()))
