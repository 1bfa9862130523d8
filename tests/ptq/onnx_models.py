"""Small ONNX models, and what other tools or a rounding make of them. The packages need not be there."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
IS_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def onnx() -> Any:
    return importlib.import_module("onnx")


def arrays(seed: int, *shape: int) -> np.ndarray:
    """Numbers whose mean is not 0."""
    return (np.random.default_rng(seed).standard_normal(shape) + 0.5).astype(np.float32)


def build(nodes: list[Any], weights: dict[str, np.ndarray], inputs: dict[str, list[Any]], output: str) -> Any:
    """A model of floating-point numbers with one output."""
    helper, kinds = onnx().helper, onnx().TensorProto
    values = [
        helper.make_tensor_value_info(name, kinds.INT64 if name == "input_ids" else kinds.FLOAT, dims)
        for name, dims in inputs.items()
    ]
    outputs = [helper.make_tensor_value_info(output, kinds.FLOAT, None)]
    tensors = [onnx().numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", values, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    """A node that is named after its output."""
    return onnx().helper.make_node(kind, inputs.split(), [output], name=f"node_{output}", **attributes)


def network() -> Any:
    """Every kind of layer, with and without a bias."""
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "c2", pads=[1, 1, 1, 1], group=2),
        node("Relu", "c2", "r2"),
        node("ConvTranspose", "r2 w3", "c3", strides=[2, 2]),
        node("GlobalAveragePool", "c3", "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat w4 b4", "g4", transB=1),
        node("MatMul", "g4 w5", "m5"),
        node("Add", "b5 m5", "a5"),
        node("Relu", "a5", "r5"),
        node("Gemm", "r5 w6", "y"),
    ]
    shapes = {
        "w1": (8, 3, 3, 3),
        "b1": (8,),
        "w2": (8, 4, 3, 3),
        "w3": (8, 6, 2, 2),
        "w4": (16, 6),
        "b4": (16,),
        "w5": (16, 32),
        "b5": (32,),
        "w6": (32, 5),
    }
    weights = {name: (arrays(i, *shape) - 0.5) * 0.3 for i, (name, shape) in enumerate(shapes.items())}
    return build(nodes, weights, {"x": ["n", 3, 8, 8]}, "y")


def language_model() -> Any:
    """An embedding and layers of attention's names, from token ids to logits."""
    nodes = [
        node("Gather", "table input_ids", "hidden"),
        node("MatMul", "hidden model.k_proj.weight", "keys"),
        node("MatMul", "hidden w1", "m1"),
        node("Add", "m1 keys", "sum"),
        node("Relu", "sum", "r1"),
        node("MatMul", "r1 w2", "m2"),
        node("Add", "m2 b2", "a2"),
        node("Relu", "a2", "r2"),
        node("MatMul", "r2 w3", "logits"),
    ]
    shapes = {"table": (96, 64), "model.k_proj.weight": (64, 64), "w1": (64, 64), "w2": (64, 96), "b2": (96,)}
    weights = {name: arrays(i, *shape) * 0.2 for i, (name, shape) in enumerate({**shapes, "w3": (96, 96)}.items())}
    return build(nodes, weights, {"input_ids": ["n", "length"]}, "logits")


def rounded(model: Any, steps: float = 2.0) -> Any:
    """A copy whose matrices and filters are rounded to a few values."""
    result = onnx().ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        values = onnx().numpy_helper.to_array(tensor)
        if values.ndim > 1 and tensor.name != "table":
            step = np.abs(values).max() / steps
            tensor.CopyFrom(onnx().numpy_helper.from_array(np.rint(values / step) * step, tensor.name))
    return result


def static(path: Path, target: Path, calibration: Iterable[Arrays], **options: Any) -> None:
    """Quantizes a file by onnxruntime, its activations by what they are on the calibration."""
    quantization = importlib.import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(calibration)

        def get_next(self) -> Arrays | None:
            return next(self.rest, None)

    quantization.quantize_static(str(path), str(target), Reader(), **options)


def dynamic(path: Path, target: Path) -> None:
    """Quantizes the weights of a file by onnxruntime, which quantizes the activations when it runs."""
    importlib.import_module("onnxruntime.quantization").quantize_dynamic(str(path), str(target))


def n_bits(path: Path, target: Path, **options: Any) -> None:
    """Packs the matrices of a file by onnxruntime."""
    module = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = module.MatMulNBitsQuantizer(str(path), **{"bits": 4, "block_size": 32, **options})
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


def run(model: Any, values: Arrays, outputs: list[str]) -> Arrays:
    """Computes any tensors of a model; values may be given for any others, which are not computed then."""
    copy = onnx().ModelProto()
    copy.CopyFrom(model)
    helper = onnx().helper
    known = {each.name for each in copy.graph.input}
    for i, each in enumerate(copy.graph.node):
        for j, name in enumerate(each.output):
            if name in values:
                each.output[j] = f"not used {i}"
    float_type = onnx().TensorProto.FLOAT
    copy.graph.input.extend(helper.make_tensor_value_info(n, float_type, None) for n in values if n not in known)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx().ValueInfoProto(name=name) for name in outputs)
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = importlib.import_module("onnxruntime").InferenceSession(copy.SerializeToString(), options)
    return dict(zip(outputs, session.run(outputs, values), strict=True))


def mean_error(y: np.ndarray, y_hat: np.ndarray, channel_axis: int) -> np.ndarray:
    """The mean of y - ŷ of each channel."""
    error = np.moveaxis(y.astype(np.float64) - y_hat.astype(np.float64), channel_axis, -1)
    return error.reshape(-1, error.shape[-1]).mean(0)


def parts(model: Any) -> dict[str, bytes]:
    """The bytes of all initializers and nodes, by name."""
    found = {each.name: each.SerializeToString() for each in model.graph.initializer}
    return found | {f"node of {each.output[0]}": each.SerializeToString() for each in model.graph.node}


Quantizer = Callable[[Path, Path], None]
