"""Corrects a quantized ONNX file against the float one that it was made of, and writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt8bit.ptq.correct import CorrectedModule, Correction, check_words
from opt8bit.ptq.corrected_onnx.batches import as_values, check_inputs
from opt8bit.ptq.corrected_onnx.editing import edited
from opt8bit.ptq.corrected_onnx.errors import OnnxError, Statistic, Tried, local_errors, try_layers
from opt8bit.ptq.corrected_onnx.graph import Graph, Model
from opt8bit.ptq.corrected_onnx.library import onnxruntime
from opt8bit.ptq.corrected_onnx.matching import match_onnx
from opt8bit.ptq.corrected_onnx.running import LOGITS, OnnxModule, Session, Values, main_output
from opt8bit.ptq.corrected_onnx.sequential import sequential_errors
from opt8bit.ptq.corrected_onnx.slots import Edit
from opt8bit.ptq.corrected_onnx.writing import check_output, is_corrected, record, write_onnx
from opt8bit.ptq.correction.placing import Placed
from opt8bit.ptq.model.bias_places import KEYS
from opt8bit.ptq.model.running import Running
from opt8bit.ptq.pairs.choice import LOSSES, HeldOut, Judge, choose
from opt8bit.ptq.report import valid_json
from opt8bit.warning import first_of, first_reasons

LEAST_IR = 4  # version of the format since which initializers need not be inputs
LISTED = 4
UNSUPPORTED = "the samples support no bias that the file can hold: there is no error, or it is not the same in all"


def correct_onnx(
    quantized: str | Path,
    reference: str | Path,
    calibration: Iterable[Mapping[str, Any]],
    *,
    output: str | Path,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    order: str = "local",
    statistic: str = "mean",
    shrink: bool = True,
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    leave: str | Sequence[str] = f"*{KEYS}*",
    again: bool = False,
    verify: bool = True,
) -> Correction:
    """Corrects the layers of a quantized ONNX file by Bias Compensation, without rounding anything.

    Each layer gets the bias ``E[y - ŷ]``, y what its namesake in the float model puts out and ŷ its own output. A bias
    that is there is raised, an optional input of the node is filled. All other initializers and nodes keep their bytes.

    Args:
        quantized, reference: files. Layers are matched by the names of their outputs, else by those of their nodes.
        calibration: an iterable of dictionaries that have an array for each input of the models. The first dimension
            counts samples. Padding does not count where there is an ``attention_mask`` (samples, length).
        output: the file to write; it must not exist.
        held_out: batches that the calibration has not. With them, groups of corrections are kept only where the loss on
            them falls: see :func:`opt8bit.ptq.correct`.
        order: "local": each layer sees what its namesake sees in the float model. "sequential": each sees what the
            corrected layers before it make of the batches; the models are run once for each depth.
        statistic: "mean" (least squared error) or "median" (least absolute error).
        shrink: whether biases are shrunk to what the samples support. A single sample supports none.
        loss: on held-out data: "kl", "mse", or a function of both models' outputs. By default "kl" where the models
            have an output that is called logits, and "mse" of their first output elsewhere.
        leave: patterns of names of nodes, outputs or weights whose layers are left as they are.
        again: whether a file that has been corrected before is corrected further.
        verify: whether the written file is loaded, and its output compared.

    Returns:
        What was done.

    Raises:
        TypeError, ValueError: an argument is none of these; the file is corrected already, or was not made of the
            reference; an output is not finite, with the name of its node; or no layer can be corrected, or none was
            better for it. Nothing is written then.
        FileExistsError: there is something at ``output``.
        ImportError: onnx or onnxruntime is not installed.
        OSError: a file cannot be written.

    Source: Minimize Quantization Output Error with Bias Compensation, https://arxiv.org/abs/2404.01892.
    """
    check_words(order, statistic, loss)
    onnxruntime()
    graph, floats = Graph.load(Path(quantized), "quantized"), Graph.load(Path(reference), "reference")
    _check_graphs(graph, floats, again)
    check_output(Path(output), graph)
    batches = as_values("calibration", calibration, graph)
    others = None if held_out is None else as_values("held_out", held_out, graph)
    run = _Run(graph, floats, batches)
    with torch.no_grad():
        run.correct(order, Statistic(statistic, shrink), [leave] if isinstance(leave, str) else leave)
        chosen = None if others is None else run.choose(others, loss)
    correction = run.report(chosen)
    if not any(module.is_kept for module in correction.modules):
        raise ValueError("no correction lowers the loss on the held-out data: the file is best as it is")
    model = run.corrected()
    options = {"version": version("opt8bit"), "order": order, "statistic": statistic, "shrink": shrink}
    record(model, valid_json({**options, "corrected": [each.name for each in correction.modules if each.is_kept]}))
    write_onnx(model, graph, Path(output), _Comparison(model, graph, batches[0]) if verify else lambda path: None)
    return correction


class _Run:
    """Corrects a model in memory.

    Attributes:
        edits: of all corrections, by layer.
        kept: those that are in the model.
    """

    def __init__(self, quantized: Graph, reference: Graph, batches: Sequence[Values]) -> None:
        self.quantized, self.reference, self.batches = quantized, reference, batches
        self.errors: list[OnnxError] = []
        self.skipped: dict[str, str] = {}
        self.edits: dict[str, Edit] = {}
        self.kept: dict[str, Edit] = {}

    def correct(self, order: str, statistic: Statistic, leave: Sequence[str]) -> None:
        """Finds the biases of all layers."""
        matches = match_onnx(self.quantized, self.reference, leave)
        tried = try_layers(self.quantized, self.reference, matches.pairs, self.batches[0], statistic)
        self.skipped = matches.skipped | tried.skipped
        _check_tried(tried, self.skipped)
        self.errors = tried.errors
        if order == "sequential":
            self.edits = sequential_errors(self.quantized, self.reference, self.errors, self.batches)
        else:
            local_errors(self.quantized, self.reference, self.errors, self.batches)
            found = {error.pair.name: error.edit() for error in self.errors}
            self.edits = {name: edit for name, edit in found.items() if edit is not None}
        if not self.edits:
            why = self.skipped | {error.pair.name: UNSUPPORTED for error in self.errors}
            raise ValueError(f"there is nothing to correct: {first_reasons(why, LISTED)}")
        self.kept = dict(self.edits)

    def choose(self, held_out: Sequence[Values], loss: str | Callable[..., Any] | None) -> HeldOut:
        """Keeps what lowers the loss on data that is held out."""
        output = main_output(self.reference)
        loss = loss or ("kl" if output == LOGITS else "mse")
        reference = OnnxModule(lambda: self.reference.model, self.reference.folder, output)
        quantized = OnnxModule(self.corrected, self.quantized.folder, output)
        placed = {name: _InFile(self.kept, name, edit, quantized) for name, edit in self.edits.items()}
        measure = LOSSES[loss] if isinstance(loss, str) else loss
        return choose(placed, Judge(Running(quantized), Running(reference), held_out, measure, None, None))

    def corrected(self) -> Model:
        """Returns the model with the corrections that are kept."""
        return edited(self.quantized.model, [edit for name, edit in self.edits.items() if name in self.kept])

    def report(self, chosen: HeldOut | None) -> Correction:
        """Says what was done."""
        modules = []
        skipped = dict(self.skipped)
        for error in self.errors:
            name = error.pair.name
            if name in self.edits:
                norm = float(error.compensation.bias.norm())
                modules.append(CorrectedModule(name, self.edits[name].words, norm, name in self.kept))
            else:
                skipped[name] = UNSUPPORTED
        return Correction(modules, skipped, chosen)


class _InFile(Placed):
    """A correction in a file that is yet to be written."""

    def __init__(self, kept: dict[str, Edit], name: str, edit: Edit, module: OnnxModule) -> None:
        self._kept, self._name, self._edit, self._module = kept, name, edit, module

    @property
    def words(self) -> str:
        return self._edit.words

    def put(self) -> None:
        if self._name not in self._kept:
            self._kept[self._name] = self._edit
            self._module.renew()

    def take_away(self) -> None:
        if self._kept.pop(self._name, None) is not None:
            self._module.renew()


class _Comparison:
    """Loads a written file, and compares its output with that of the model in memory."""

    def __init__(self, model: Model, graph: Graph, batch: Values) -> None:
        self._name, self._batch = main_output(graph), batch
        self._output = Session(model, graph.folder)(batch, [self._name])[self._name]

    def __call__(self, path: Path) -> None:
        """
        Raises:
            ValueError: the file does not do what the model does.
        """
        found = Session(path, path.parent)(self._batch, [self._name])[self._name]
        if found.shape != self._output.shape or not torch.allclose(found, self._output, equal_nan=True):
            raise ValueError(f"what was written does not compute what was made: {self._name} differs")


def _check_graphs(quantized: Graph, reference: Graph, again: bool) -> None:
    for name, graph in (("quantized", quantized), ("reference", reference)):
        if graph.model.ir_version < LEAST_IR:
            raise ValueError(f"{name} must be of IR version {LEAST_IR} or later, got {graph.model.ir_version}")
    check_inputs(quantized, reference)
    if is_corrected(quantized.model) and not again:
        raise ValueError("the file is corrected already: ask for another correction on top, by again=True or --again")
    if main_output(reference) not in quantized.outputs:
        raise ValueError(f"the quantized file must have the output {main_output(reference)} of the reference")


def _check_tried(tried: Tried, skipped: Mapping[str, str]) -> None:
    if len(tried.alien) > len(tried.errors):
        found = first_of([f"{name} ({cosine:.2f})" for name, cosine in tried.alien.items()], LISTED)
        raise ValueError(f"the reference is not what the file was made of: outputs differ in {found}, by their cosine")
    if not tried.errors:
        found = first_reasons(skipped, LISTED) or "the reference has no linear layers"
        raise ValueError(f"no layer of the file can be corrected: {found}")
