"""Runs ONNX models on the CPU, from tensors to tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from opt8bit.ptq.corrected_onnx.graph import Graph, Model
from opt8bit.ptq.corrected_onnx.library import onnxruntime

FOLDER = "session.model_external_initializers_file_folder_path"  # onnxruntime's option
LOGITS = "logits"
ERRORS = 3  # of onnxruntime's levels of messages: warnings are left out
DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
}

Values = Mapping[str, Tensor]


class Session:
    """A model that is ready to run, with as many threads as torch has.

    Args:
        model: as a path, or in memory.
        folder: of the files in which its weights may be.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: it cannot load the model.
    """

    def __init__(self, model: Path | Model, folder: Path) -> None:
        library = onnxruntime()
        options = library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = ERRORS
        source = str(model)
        if not isinstance(model, Path):
            options.add_session_config_entry(FOLDER, str(folder.resolve()))
            source = model.SerializeToString()
        try:
            self._session = library.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes, without a base that tells them
            raise ValueError(f"onnxruntime cannot load the model: {error}") from error
        self._inputs = {each.name: each.type for each in self._session.get_inputs()}

    def __call__(self, values: Values, outputs: Collection[str]) -> dict[str, Tensor]:
        """Returns some outputs by name.

        Args:
            values: of the inputs. Numbers are converted to the input's type, whole ones to whole ones only.
            outputs: names of the outputs.

        Raises:
            ValueError: onnxruntime cannot run the model on these.
        """
        feeds = {name: _converted(values[name], DTYPES.get(kind)).numpy() for name, kind in self._inputs.items()}
        try:
            found = self._session.run(list(outputs), feeds)
        except Exception as error:
            raise ValueError(f"onnxruntime cannot run the model: {error}") from error
        return {name: torch.from_numpy(array) for name, array in zip(outputs, found, strict=True)}


class Tensors:
    """Computes tensors of a graph from its inputs.

    Args:
        graph: of the model.
        names: of the tensors. Inputs may be among them.
    """

    def __init__(self, graph: Graph, names: Collection[str]) -> None:
        self._names = names
        self._computed = sorted({name for name in names if name in graph.producers})
        self._session = Session(graph.part(self._computed), graph.folder) if self._computed else None

    def __call__(self, batch: Values) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        computed = {} if self._session is None else self._session(batch, self._computed)
        return {name: computed[name] if name in computed else batch[name] for name in self._names}


class OnnxModule(nn.Module):
    """A whole model as a module, which is called with its inputs by name and returns one output.

    Args:
        build: returns the model. It is called again after :meth:`renew`.
        folder: of the files in which its weights may be.
        output: name of the output.
    """

    def __init__(self, build: Callable[[], Model], folder: Path, output: str) -> None:
        super().__init__()
        self._build, self._folder, self._output = build, folder, output
        self._session: Session | None = None

    def renew(self) -> None:
        """Lets the next call build the model again."""
        self._session = None

    def forward(self, **inputs: Tensor) -> Tensor:
        if self._session is None:
            self._session = Session(self._build(), self._folder)
        return self._session(inputs, [self._output])[self._output]


def main_output(graph: Graph) -> str:
    """Returns the output by which two models are compared: the logits, or the first one."""
    return LOGITS if LOGITS in graph.outputs else graph.outputs[0]


def _converted(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    same_kind = dtype is not None and dtype.is_floating_point == value.is_floating_point() and value.dtype != torch.bool
    return value.to(dtype) if same_kind else value
