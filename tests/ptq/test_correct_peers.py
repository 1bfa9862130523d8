"""Correction of what other tools have quantized. Each test is skipped where its package is not installed."""

import copy
import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packed_checkpoints import KINDS, write_packed
from torch import Tensor, nn
from toys import MODELS, Mlp, token_ids

from opt8bit import ptq

WIDE = (64, 128, 32)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages' own


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def torchao(config: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def quantize(model: Any) -> Any:
        quantization = importlib.import_module("torchao.quantization")
        quantization.quantize_(model, config(quantization))
        return model

    return quantize


def intx(bits: str) -> Callable[[Any], Any]:
    return torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=getattr(torch, bits), granularity=q.PerGroup(32)))


def quanto(kind: str) -> Callable[[Any], Any]:
    def quantize(model: Any) -> Any:
        package = importlib.import_module("optimum.quanto")
        package.quantize(model, weights=getattr(package, kind))
        package.freeze(model)
        return model

    return quantize


def bitsandbytes(make: Callable[[Any, nn.Linear], Any]) -> Callable[[Any], Any]:
    def quantize(model: Any) -> Any:
        package = importlib.import_module("bitsandbytes")
        for name in ("first", "second"):
            layer = getattr(model, name)
            quantized = make(package.nn, layer)
            quantized.load_state_dict(layer.state_dict())
            setattr(model, name, quantized)
        return model.to("cpu")

    return quantize


def four_bits(kind: str) -> Callable[[Any], Any]:
    return bitsandbytes(
        lambda package, layer: package.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,
            quant_type=kind,
        )
    )


class Peer(NamedTuple):
    package: str
    quantize: Callable[[Any], Any]  # in place; returns the model


PEERS = {
    "torchao int8": Peer("torchao", torchao(lambda q: q.Int8WeightOnlyConfig())),
    "torchao int8, dynamic": Peer("torchao", torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())),
    "torchao int4": Peer("torchao", intx("int4")),
    "torchao int2": Peer("torchao", intx("int2")),
    "quanto int8": Peer("optimum", quanto("qint8")),
    "quanto int4": Peer("optimum", quanto("qint4")),
    "quanto int2": Peer("optimum", quanto("qint2")),
    "bitsandbytes nf4": Peer("bitsandbytes", four_bits("nf4")),
    "bitsandbytes fp4": Peer("bitsandbytes", four_bits("fp4")),
}


def batches(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5 for seed in range(6)]


def check(model: Any, quantized: Any, data: list[Tensor], order: str, axis: int) -> None:
    """The mean error of the first layer, and in sequence of the last one, is gone; only biases have changed."""
    x = torch.cat(data)
    dims = [dim for dim in range(x.dim()) if dim != axis % x.dim()]
    with torch.no_grad():
        before = [(model(x) - quantized(x)).mean(dims).norm(), (model.first(x) - quantized.first(x)).mean(dims).norm()]
        correction = ptq.correct(quantized, model, data, order=order, shrink=False)
        after = [(model(x) - quantized(x)).mean(dims).norm(), (model.first(x) - quantized.first(x)).mean(dims).norm()]
    places = {module.name: module.place for module in correction.modules}
    assert places == {n: "new bias" if model.get_submodule(n).bias is None else "bias" for n in ("first", "second")}
    assert after[1] < 0.02 * before[1]
    assert after[0] < (1e-3 if order == "sequential" else 0.5) * before[0]


@pytest.mark.parametrize("order", ["local", "sequential"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PEERS)
def test_linear_layers(name: str, bias: bool, order: str) -> None:
    pytest.importorskip(PEERS[name].package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = PEERS[name].quantize(Mlp(bias, WIDE))
    check(Mlp(bias, WIDE), quantized, batches(16, 10, 64), order, -1)


@pytest.mark.parametrize("order", ["local", "sequential"])
def test_convolutions_of_quanto(order: str) -> None:
    pytest.importorskip("optimum.quanto")
    check(Cnn(), quanto("qint4")(Cnn()), batches(16, 3, 8, 8), order, 1)


@pytest.mark.parametrize("order", ["local", "sequential"])
def test_a_checkpoint_that_transformers_loads(order: str, tmp_path: Path) -> None:
    """Packed layers of compressed-tensors hold biases: the last one's error is centred."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model, ids = MODELS["llama"](), token_ids(32)
    result = ptq.compress(model, ids, method="rtn", bits=3, group_size=16, error_propagation=0.0)
    ptq.export(result, tmp_path / "out", format="compressed-tensors")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check_the_last_layer(model, quantized, ids, order)


@pytest.mark.parametrize("order", ["local", "sequential"])
@pytest.mark.parametrize(("kind", "layers"), [("gptq-order", "gptq_torch"), ("awq", "torch_awq")])
def test_checkpoints_that_transformers_loads_by_gptqmodel(
    kind: str, layers: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gptqmodel")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it takes minutes
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "float")
    write_packed(tmp_path / "float", tmp_path / "packed", KINDS[kind])
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    config["quantization_config"] = {**KINDS[kind].header, "backend": layers}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map="cpu", dtype=torch.float32
    )
    check_the_last_layer(model, quantized, token_ids(32), order)


def check_the_last_layer(model: Any, quantized: Any, ids: Tensor, order: str) -> None:
    """The mean error of a language model's last layer is gone, and the weights are as they were."""
    before = copy.deepcopy({k: v for k, v in quantized.state_dict().items() if "weight" in k})
    name = "model.layers.1.mlp.down_proj"
    correction = ptq.correct(quantized, model, ids.split(8), order=order, shrink=False)
    assert name in {module.name for module in correction.modules}
    seen: dict[bool, tuple[Any, Tensor]] = {}
    for network in (model, quantized):
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, is_float=network is model: seen.update({is_float: (args, output)})
        )
    with torch.no_grad():
        model(ids)
        quantized(ids)
        y = seen[True][1]
        y_hat = quantized.get_submodule(name)(*seen[True][0]) if order == "local" else seen[False][1]
    assert (y - y_hat).mean((0, 1)).norm() < 1e-3 * (y - y_hat).norm()
    after = quantized.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
