#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static makes of a Gemm with beta another one, and a session that optimizes it a third one.
#
# A Gemm computes x @ w + beta * bias. What quantize_static writes has lost its beta: the whole bias is added. It has put
# the beta into the step of the bias's codes, which a session reads without optimizations, and ignores by default, where
# the nodes become a QGemm, whose bias has the step of the product. So a beta of 1/2 becomes 1, or 2. Nothing is said.
# Expected: x @ w + beta * bias, up to the steps of codes, at every level.
# Why it matters: the error of the quantized layer is the bias, and no choice of calibration data makes it smaller. Who
# measures or corrects it does so for one level of optimization.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
finding <<'PYTHON'
import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

numbers = numpy.random.default_rng(0)
x, w = (numbers.uniform(-1, 1, shape).astype(numpy.float32) for shape in ((64, 6), (6, 4)))
bias = numpy.float32([0.3, -0.3, 0.2, 0.4])  # so small that no output is clipped
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_EXTENDED")


class Data(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": x}])

    def get_next(self):
        return next(self.batches, None)


def write(beta):
    nodes = [helper.make_node("Gemm", ["x", "w", "bias"], ["y"], beta=beta)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 6), ("y", 4))]
    weights = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "bias")]
    graph = helper.make_graph(nodes, "gemm", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "float.onnx")
    quantize_static("float.onnx", "quantized.onnx", Data(), quant_format=QuantFormat.QDQ)


def added(level):
    """What the quantized model adds to x @ w on the average, in biases."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession("quantized.onnx", options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return float(((y - x @ w).mean(0) @ bias) / (bias @ bias))


for beta, expected in ((1.0, (1, 1)), (0.5, (1, 2))):
    write(beta)
    found = [added(level) for level in LEVELS]
    print(f"beta {beta}: the bias is added", ", ".join(f"{times:.2f} times by {each}" for times, each in zip(found, LEVELS)))
    assert numpy.allclose(found, expected, atol=0.05), found
PYTHON

# Output seen:
#   versions: Python 3.11.7, onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6
#   beta 1.0: the bias is added 1.00 times by ORT_DISABLE_ALL, 1.00 times by ORT_ENABLE_EXTENDED
#   beta 0.5: the bias is added 1.00 times by ORT_DISABLE_ALL, 1.98 times by ORT_ENABLE_EXTENDED
