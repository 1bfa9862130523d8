"""Correction of quantized ONNX files, by onnxruntime's own quantizers and by rounding, against the float files."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_models as models
import pytest
import torch
from onnx_models import Arrays, arrays, build, mean_error, network, node, parts, rounded, run
from torch.nn.functional import kl_div

from opt8bit import ptq
from opt8bit.ptq.corrected_onnx.library import onnxruntime

pytestmark = [
    pytest.mark.skipif(not models.IS_INSTALLED, reason="onnx and onnxruntime are not installed"),
    pytest.mark.filterwarnings("ignore"),  # of the packages' own
]
ORDERS = ("local", "sequential")
EXACT = 1e-6  # of the largest output: float32 rounds a bias and the sums that it is added to


class Layer(NamedTuple):
    """What goes into a layer and comes out, by the float model's names, and what comes out by the quantized one's."""

    x: str
    y: str
    channel_axis: int
    y_hat: str


LAYERS = {
    "node_c1": Layer("x", "c1", 1, "c1"),
    "node_c2": Layer("r1", "c2", 1, "c2"),
    "node_c3": Layer("r2", "c3", 1, "c3"),
    "node_g4": Layer("flat", "g4", -1, "g4"),
    "node_m5": Layer("g4", "a5", -1, "a5"),
    "node_y": Layer("r5", "y", -1, "y"),
}
# onnxruntime drops activations that a tensor's codes stand for, and renames what goes into the last codes.
RENAMED = {"c1": "r1", "c2": "r2", "a5": "r5", "y": "y_QuantizeLinear_Input"}
STATIC_LAYERS = {name: each._replace(y_hat=RENAMED.get(each.y, each.y)) for name, each in LAYERS.items()}
LM_LAYERS = {
    "node_m1": Layer("hidden", "m1", -1, "m1"),
    "node_m2": Layer("r1", "a2", -1, "a2"),
    "node_logits": Layer("r2", "logits", -1, "logits"),
}


def images(seed: int) -> list[Arrays]:
    return [{"x": arrays(10 * seed + i, 4, 3, 8, 8)} for i in range(4)]


def texts(seed: int) -> list[Arrays]:
    return [{"input_ids": np.random.default_rng(10 * seed + i).integers(96, size=(4, 12))} for i in range(4)]


def n_bits(path: Path, target: Path) -> None:
    pytest.importorskip("onnx_ir")
    models.n_bits(path, target)


def by_rounding(path: Path, target: Path) -> None:
    models.onnx().save(rounded(models.onnx().load(str(path))), str(target))


class Case(NamedTuple):
    model: Callable[[], Any]
    quantize: models.Quantizer
    data: Callable[[int], list[Arrays]]
    layers: dict[str, Layer]
    skipped: set[str]


def static(path: Path, target: Path) -> None:
    models.static(path, target, images(7))


def static_per_channel(path: Path, target: Path) -> None:
    models.static(path, target, images(7), per_channel=True)


WITH_BIAS = {name: LAYERS[name] for name in ("node_c1", "node_g4", "node_m5")}
CASES = {
    "rounded": Case(network, by_rounding, images, LAYERS, set()),
    "static": Case(network, static, images, STATIC_LAYERS, set()),
    "static, per channel": Case(network, static_per_channel, images, STATIC_LAYERS, set()),
    "dynamic": Case(network, models.dynamic, images, WITH_BIAS, {"node_c2", "node_c3", "node_y"}),
    "n bits": Case(models.language_model, n_bits, texts, LM_LAYERS, {"node_keys"}),
}


class Files(NamedTuple):
    quantized: Path
    reference: Path
    output: Path

    def correct(self, data: list[Arrays], **options: Any) -> ptq.Correction:
        return ptq.correct_onnx(self.quantized, self.reference, data, **{"output": self.output, **options})

    def models(self) -> tuple[Any, Any, Any]:
        """The float model, the quantized one and the corrected one."""
        load = models.onnx().load
        return load(str(self.reference)), load(str(self.quantized)), load(str(self.output))


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Files]:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("models")
    return case, saved(folder, case.model(), case.quantize)


@pytest.fixture
def case(made: tuple[Case, Files], tmp_path: Path) -> tuple[Case, Files]:
    return made[0], made[1]._replace(output=tmp_path / "out.onnx")


@pytest.fixture
def small(tmp_path: Path) -> Files:
    return saved(tmp_path, network(), by_rounding)


def saved(folder: Path, model: Any, quantize: models.Quantizer | Any) -> Files:
    """A model and what is made of it, which may be a model already."""
    files = Files(folder / "quantized.onnx", folder / "float.onnx", folder / "out.onnx")
    models.onnx().save(model, str(files.reference))
    if callable(quantize):
        quantize(files.reference, files.quantized)
    else:
        models.onnx().save(quantize, str(files.quantized))
    return files


def half_steps(model: Any, output: str) -> np.ndarray | float:
    """Half of the step between values of a coded bias; infinite where that is clipped, 0 where it is not coded."""
    producers = {name: each for each in model.graph.node for name in each.output}
    tensors = weights_of(model)
    layer = producers[output]
    coded = [producers[name] for name in layer.input if name in producers]
    coded = [each for each in coded if each.op_type == "DequantizeLinear"]
    vectors = [each for each in coded if tensors.get(each.input[0], np.array(0)).ndim == 1]
    if vectors:
        codes, scale = (tensors[name] for name in vectors[-1].input[:2])
        limits = np.iinfo(codes.dtype)
        return np.where((codes > limits.min) & (codes < limits.max), scale / 2, np.inf)
    if layer.op_type == "ConvTranspose" and len(coded) == 2:  # onnxruntime itself rounds its bias when it loads it
        return (tensors[coded[0].input[1]] * tensors[coded[1].input[1]]).max() / 2
    return 0.0


def joined(model: Any, data: list[Arrays], names: list[str]) -> Arrays:
    found = [run(model, batch, names) for batch in data]
    return {name: np.concatenate([each[name] for each in found]) for name in names}


def test_afterwards_the_mean_error_of_each_layer_is_zero_on_the_floats_inputs(case: tuple[Case, Files]) -> None:
    about, files = case
    data = about.data(1)
    correction = files.correct(data, shrink=False)
    assert {module.name for module in correction.modules} == set(about.layers)
    assert set(correction.skipped) == about.skipped and correction.held_out is None
    reference, quantized, corrected = files.models()
    for layer in about.layers.values():
        floats = joined(reference, data, [layer.x, layer.y])
        seen = [{**batch, layer.x: x} for batch, x in zip(data, np.split(floats[layer.x], len(data)), strict=True)]
        y = floats[layer.y]
        before, after = (
            mean_error(y, joined(model, seen, [layer.y_hat])[layer.y_hat], layer.channel_axis)
            for model in (quantized, corrected)
        )
        allowed = EXACT * np.abs(y).max() + half_steps(corrected, layer.y_hat)
        assert (np.abs(after) <= allowed).all(), layer
        assert np.linalg.norm(after) < np.linalg.norm(before), layer


def test_in_sequence_the_mean_error_is_zero_in_the_model_itself(case: tuple[Case, Files]) -> None:
    about, files = case
    data = about.data(1)
    files.correct(data, shrink=False, order="sequential")
    reference, _, corrected = files.models()
    for layer in about.layers.values():
        y, y_hat = joined(reference, data, [layer.y])[layer.y], joined(corrected, data, [layer.y_hat])[layer.y_hat]
        error = mean_error(y, y_hat, layer.channel_axis)
        assert (np.abs(error) <= EXACT * np.abs(y).max() + half_steps(corrected, layer.y_hat)).all(), layer


def test_everything_else_keeps_its_bytes(case: tuple[Case, Files]) -> None:
    about, files = case
    correction = files.correct(about.data(1))
    _, quantized, corrected = files.models()
    before, after = parts(quantized), parts(corrected)
    changed = {name for name, data in before.items() if after.get(name) != data}
    added = set(after) - set(before)
    new = [module for module in correction.modules if module.place == "new bias"]
    assert sum(name.startswith("node of ") for name in changed) == len(new)
    assert len(changed) == len(correction.modules)
    assert len([name for name in added if "_bias" in name]) == len(added) >= len(new)
    kinds = {type(each.initializer) for each in (quantized.graph, corrected.graph)}
    assert len(kinds) == 1
    for each in (quantized, corrected):
        for field in ("node", "initializer"):
            each.graph.ClearField(field)
    del corrected.metadata_props[-1]
    assert quantized.SerializeToString() == corrected.SerializeToString()


def test_layers_in_integers_stay_so(tmp_path: Path) -> None:
    files = saved(tmp_path, network(), static)
    files.correct(images(1))
    kinds = []
    for path in (files.quantized, files.output):
        options = onnxruntime().SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
        options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        onnxruntime().InferenceSession(str(path), options)
        optimized = models.onnx().load(options.optimized_model_filepath)
        kinds.append([each.op_type for each in optimized.graph.node if each.op_type.startswith("QLinear")])
    assert kinds[0] == kinds[1] and kinds[0].count("QLinearConv") == 2


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_kept_lowers_the_loss_on_held_out_data(small: Files, order: str) -> None:
    correction = small.correct(images(1), held_out=images(2), order=order)
    assert correction.held_out is not None
    reference, quantized, corrected = small.models()
    y = joined(reference, images(2), ["y"])["y"]
    losses = [np.square(joined(model, images(2), ["y"])["y"] - y).mean() for model in (quantized, corrected)]
    assert losses == pytest.approx([correction.held_out.before, correction.held_out.after], rel=1e-4)
    assert losses[1] < losses[0]
    kept = [module.name for module in correction.modules if module.is_kept]
    assert json.loads(corrected.metadata_props[-1].value)["corrected"] == kept


def test_the_loss_of_logits_is_the_divergence_of_predictions(tmp_path: Path) -> None:
    model = models.language_model()
    files = saved(tmp_path, model, rounded(model))
    correction = files.correct(texts(1), held_out=texts(2))
    assert correction.held_out is not None
    reference, _, corrected = files.models()
    p, q = (torch.from_numpy(joined(each, texts(2), ["logits"])["logits"]) for each in (reference, corrected))
    loss = kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    assert float(loss) == pytest.approx(correction.held_out.after, rel=1e-4)


def test_a_bias_is_the_compensations(small: Files) -> None:
    """With shrinking, and as a median."""
    data = images(1)
    for statistic in ("mean", "median"):
        output = small.output.with_name(f"{statistic}.onnx")
        small.correct(data, statistic=statistic, output=output)
        reference, quantized, _ = small._replace(output=output).models()
        found = models.onnx().load(str(output))
        compensation = ptq.BiasCompensation(8, 1, statistic=statistic)
        for batch in data:
            y, y_hat = run(reference, batch, ["c1"])["c1"], run(quantized, batch, ["c1"])["c1"]
            compensation.update(torch.from_numpy(y), torch.from_numpy(y_hat))
        biases = [weights_of(model)["b1"] for model in (quantized, found)]
        assert np.abs(biases[1] - biases[0] - compensation.bias.numpy()).max() < 1e-5


def weights_of(model: Any) -> Arrays:
    return {each.name: models.onnx().numpy_helper.to_array(each) for each in model.graph.initializer}


def test_padding_does_not_count(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "table input_ids", "hidden"),
        node("Unsqueeze", "attention_mask axis", "mask"),
        node("Mul", "hidden mask", "masked"),
        node("MatMul", "masked w", "m"),
        node("Add", "m b", "logits"),
    ]
    weights = {"table": arrays(0, 9, 6), "w": arrays(1, 6, 5), "b": arrays(2, 5), "axis": np.array([-1])}
    inputs = {"input_ids": ["n", "l"], "attention_mask": ["n", "l"]}
    model = build(nodes, weights, inputs, "logits")
    files = saved(tmp_path, model, rounded(model))
    generator = np.random.default_rng(0)
    ids, mask = generator.integers(9, size=(8, 10)), np.ones((8, 10), np.float32)
    mask[:, 6:] = 0
    files.correct([{"input_ids": ids, "attention_mask": mask}], shrink=False)
    reference, _, corrected = files.models()
    short = {"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}
    y, y_hat = (run(each, short, ["logits"])["logits"] for each in (reference, corrected))
    assert np.abs(mean_error(y, y_hat, -1)).max() < 1e-5


def renamed(model: Any, tensors: bool, nodes: bool) -> Any:
    """A copy whose tensors or nodes have other names."""
    result = copy.deepcopy(model)
    names = {name for each in result.graph.node for name in each.output} - {each.name for each in result.graph.output}
    for each in result.graph.node:
        each.name = f"other {each.name}" if nodes else each.name
        for names_of in (each.input, each.output) if tensors else ():
            for i, name in enumerate(names_of):
                names_of[i] = f"other {name}" if name in names else name
    return result


@pytest.mark.parametrize("tensors", [True, False])
def test_one_of_both_names_is_enough(small: Files, tensors: bool) -> None:
    small.correct(images(1))
    expected = weights_of(small.models()[2])
    _, quantized, _ = small.models()
    models.onnx().save(renamed(quantized, tensors, not tensors), str(small.quantized))
    output = small.output.with_name("other.onnx")
    assert not small.correct(images(1), output=output).skipped
    found = weights_of(models.onnx().load(str(output)))
    assert all(np.array_equal(found[name], expected[name]) for name in ("b1", "b4", "b5"))
    assert len(found) == len(expected)


def test_without_common_names_nothing_is_written(small: Files) -> None:
    _, quantized, _ = (*small._replace(output=small.quantized).models(),)
    models.onnx().save(renamed(quantized, True, True), str(small.quantized))
    with pytest.raises(ValueError, match="no layer of the file can be corrected: node_c1"):
        small.correct(images(1))
    assert not small.output.exists()


def test_a_bias_that_others_read_stays_theirs(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w1 b", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2 b", "c2", pads=[1, 1, 1, 1]),
        node("Identity", "b", "same"),
        node("Conv", "c2 w3 same", "y"),
    ]
    weights = {"w1": arrays(0, 4, 3, 3, 3), "w2": arrays(1, 4, 4, 3, 3), "w3": arrays(2, 4, 4, 1, 1)}
    model = build(nodes, {**weights, "b": arrays(3, 4)}, {"x": ["n", 3, 8, 8]}, "y")
    files = saved(tmp_path, model, rounded(model))
    files.correct(images(1), shrink=False, order="sequential")
    reference, _, corrected = files.models()
    assert np.array_equal(weights_of(corrected)["b"], weights_of(reference)["b"])
    for name in ("c1", "c2", "y"):
        y, y_hat = (joined(each, images(1), [name])[name] for each in (reference, corrected))
        assert np.abs(mean_error(y, y_hat, 1)).max() <= EXACT * np.abs(y).max()


@pytest.mark.parametrize("bias", ["", " b"])
def test_the_factor_of_a_bias(tmp_path: Path, bias: str) -> None:
    weights = {"w": arrays(0, 16, 6), "b": arrays(1, 1, 16)}
    model = build([node("Gemm", f"x w{bias}", "y", transB=1, alpha=2.0, beta=0.5)], weights, {"x": ["n", 6]}, "y")
    files = saved(tmp_path, model, rounded(model))
    data = [{"x": arrays(i, 16, 6)} for i in range(4)]
    files.correct(data, shrink=False)
    reference, _, corrected = files.models()
    y, y_hat = (joined(each, data, ["y"])["y"] for each in (reference, corrected))
    assert np.abs(mean_error(y, y_hat, -1)).max() <= EXACT * np.abs(y).max()


def test_batch_norms_that_a_tool_has_folded(tmp_path: Path) -> None:
    """The convolution of the quantized model has the name of the norm's output then."""
    norm = {"scale": arrays(4, 4) + 1, "shift": arrays(5, 4), "mean": arrays(6, 4), "var": arrays(7, 4) ** 2 + 1}
    conv, last = node("Conv", "x w1 b1", "c1"), node("Relu", "n1", "y")
    weights = {"w1": arrays(0, 4, 3, 3, 3), "b1": arrays(1, 4)}
    inputs: dict[str, list[Any]] = {"x": ["n", 3, 8, 8]}
    normalized = node("BatchNormalization", "c1 scale shift mean var", "n1")
    model = build([conv, normalized, last], {**weights, **norm}, inputs, "y")
    factor = norm["scale"] / np.sqrt(norm["var"] + 1e-5)
    folded = {
        "w1": weights["w1"] * factor[:, None, None, None],
        "b1": (weights["b1"] - norm["mean"]) * factor + norm["shift"],
    }
    single = node("Conv", "x w1 b1", "n1")
    single.name = conv.name
    files = saved(tmp_path, model, rounded(build([single, last], folded, inputs, "y")))
    files.correct(images(1), shrink=False)
    reference, _, corrected = files.models()
    y, y_hat = (joined(each, images(1), ["n1"])["n1"] for each in (reference, corrected))
    assert np.abs(mean_error(y, y_hat, 1)).max() <= EXACT * np.abs(y).max()


def test_layers_in_float16(tmp_path: Path) -> None:
    """Between casts, with names as converters give them."""
    model = build(
        [node("Gemm", "x w1 b1", "g1"), node("Relu", "g1", "r1"), node("Gemm", "r1 w2", "y")],
        {"w1": arrays(0, 6, 16), "b1": arrays(1, 16), "w2": arrays(2, 16, 4)},
        {"x": ["n", 6]},
        "y",
    )
    half = {name: value.astype(np.float16) for name, value in weights_of(rounded(model)).items()}
    to_half, to_float = models.onnx().TensorProto.FLOAT16, models.onnx().TensorProto.FLOAT
    nodes = [
        node("Cast", "x", "x_half", to=to_half),
        *(node(*each) for each in (("Gemm", "x_half w1 b1", "g1"), ("Relu", "g1", "r1"), ("Gemm", "r1 w2", "y_half"))),
        node("Cast", "y_half", "y", to=to_float),
    ]
    files = saved(tmp_path, model, build(nodes, half, {"x": ["n", 6]}, "y"))
    data = [{"x": arrays(i, 16, 6)} for i in range(4)]
    correction = files.correct(data, shrink=False, order="sequential")
    assert [module.place for module in correction.modules] == ["bias", "new bias"]
    reference, quantized, corrected = files.models()
    y, before, after = (joined(each, data, ["y"])["y"] for each in (reference, quantized, corrected))
    assert np.abs(mean_error(y, after, -1)).max() <= 1e-3 * np.abs(y).max() < np.abs(mean_error(y, before, -1)).max()
    assert all(value.dtype == np.float16 for value in weights_of(corrected).values())


def test_weights_in_a_file_beside_it(small: Files, tmp_path: Path) -> None:
    _, quantized, _ = small._replace(output=small.quantized).models()
    small.correct(images(1))
    expected = weights_of(small.models()[2])
    place = tmp_path / "external" / "model.onnx"
    place.parent.mkdir()
    models.onnx().save(quantized, str(place), save_as_external_data=True, location="weights.bin", size_threshold=0)
    there = small._replace(quantized=place, output=tmp_path / "out" / "corrected.onnx")
    there.correct(images(1), held_out=images(2))
    assert (there.output.parent / "weights.bin").read_bytes() == (place.parent / "weights.bin").read_bytes()
    assert sorted(os.listdir(there.output.parent)) == ["corrected.onnx", "weights.bin"]
    beside = there._replace(output=place.with_name("corrected.onnx"))
    beside.correct(images(1))
    assert sorted(os.listdir(place.parent)) == ["corrected.onnx", "model.onnx", "weights.bin"]
    found = weights_of(models.onnx().load(str(beside.output)))
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    with pytest.raises(FileExistsError, match=r"weights\.bin exists"):
        there._replace(output=there.output.with_name("again.onnx")).correct(images(1))
    target = tmp_path / "elsewhere"
    shutil.move(place.parent / "weights.bin", target)
    (place.parent / "weights.bin").symlink_to(target)
    with pytest.raises(ValueError, match=r"weights\.bin holds weights, and is missing or a link"):
        there._replace(output=tmp_path / "third" / "out.onnx").correct(images(1))
    assert not (tmp_path / "third").exists()


def broken(files: Files, name: str) -> None:
    """Puts a number that is none into the weights of the quantized file."""
    model = models.onnx().load(str(files.quantized))
    for each in model.graph.initializer:
        if each.name == name:
            values = models.onnx().numpy_helper.to_array(each).copy()
            values.flat[0] = np.nan
            each.CopyFrom(models.onnx().numpy_helper.from_array(values, name))
    models.onnx().save(model, str(files.quantized))


@pytest.fixture
def nothing_written(small: Files) -> Iterator[None]:
    before = sorted(os.listdir(small.output.parent))
    yield
    assert sorted(os.listdir(small.output.parent)) == before


@pytest.mark.usefixtures("nothing_written")
class TestRefused:
    def test_outputs_that_are_not_finite(self, small: Files) -> None:
        broken(small, "w3")
        with pytest.raises(ValueError, match="node_c3: quantized_output must be finite, got nan"):
            small.correct(images(1))

    def test_a_reference_of_other_weights(self, small: Files) -> None:
        reference, _, _ = small._replace(output=small.quantized).models()
        for i, each in enumerate(reference.graph.initializer):
            values = arrays(50 + i, *each.dims) - 0.5
            each.CopyFrom(models.onnx().numpy_helper.from_array(values, each.name))
        models.onnx().save(reference, str(small.reference))
        with pytest.raises(ValueError, match="the reference is not what the file was made of: outputs differ in node_"):
            small.correct(images(1))

    @pytest.mark.parametrize(
        ("data", "error", "match"),
        [
            ([], ValueError, "calibration must hold at least one batch"),
            ({"x": arrays(0, 4, 3, 8, 8)}, TypeError, "put a single one in a list"),
            ([arrays(0, 4, 3, 8, 8)], TypeError, "must hold dictionaries of arrays, got ndarray"),
            ([{"image": arrays(0, 4, 3, 8, 8)}], ValueError, "the model's inputs in each batch: x, got image"),
            ([{"x": [1.0]}], TypeError, "calibration: x must be an array or a tensor, got list"),
            ([{"x": np.array(["a"])}], TypeError, "must be an array of numbers, got <U1"),
            ([{"x": arrays(0, 4, 2, 8, 8)}], ValueError, "onnxruntime cannot run the model"),
        ],
    )
    def test_data_of_another_kind(self, small: Files, data: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            small.correct(data)

    @pytest.mark.parametrize(
        ("option", "match"),
        [
            ({"order": "random"}, "order must be one of local, sequential, got 'random'"),
            ({"statistic": "mode"}, "statistic must be one of mean, median, got 'mode'"),
            ({"loss": "l1"}, "loss must be one of kl, mse, got 'l1'"),
        ],
    )
    def test_other_options(self, small: Files, option: dict[str, str], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            small.correct(images(1), **option)

    def test_no_files(self, small: Files, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="quantized must be an ONNX file, there is no"):
            small._replace(quantized=tmp_path / "other.onnx").correct(images(1))

    def test_everything_left_out(self, small: Files) -> None:
        with pytest.raises(ValueError, match=r"no layer of the file can be corrected: node_c1 .it is among those"):
            small.correct(images(1), leave="*")

    def test_a_single_sample(self, small: Files) -> None:
        with pytest.raises(ValueError, match=r"there is nothing to correct: node_c1 .the samples support no bias"):
            small.correct([{"x": arrays(0, 1, 3, 8, 8)}])

    def test_what_is_no_better(self, small: Files) -> None:
        with pytest.raises(ValueError, match="no correction lowers the loss on the held-out data"):
            small.correct(
                images(1), held_out=images(2), loss=lambda output_hat, output: -(output_hat - output).square()
            )

    @pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
    def test_a_missing_package(self, small: Files, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf'{name} is missing: pip install "opt8bit\[onnx\]"'):
            small.correct(images(1))

    def test_layers_on_codes(self, small: Files) -> None:
        quantization = pytest.importorskip("onnxruntime.quantization")
        reference, quantized = small.reference, small.quantized
        models.static(reference, quantized, images(7), quant_format=quantization.QuantFormat.QOperator)
        with pytest.raises(ValueError, match=r"node_c1 .QLinearConv computes it on codes, and is not corrected"):
            small.correct(images(1))


def test_once_is_enough(small: Files) -> None:
    small.correct(images(1))
    with pytest.raises(FileExistsError, match=r"out\.onnx exists"):
        small.correct(images(1))
    second = Files(small.output, small.reference, small.output.with_name("second.onnx"))
    with pytest.raises(ValueError, match="corrected already: ask for another correction on top"):
        second.correct(images(2))
    second.correct(images(2), again=True)
    assert [each.key for each in second.models()[2].metadata_props].count("opt8bit.correction") == 1
