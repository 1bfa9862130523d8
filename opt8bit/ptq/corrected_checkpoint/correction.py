"""Corrects a quantized checkpoint against the float model that it was made of, and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.correct import Correction, correct
from opt8bit.ptq.corrected_checkpoint.layers import layers_of
from opt8bit.ptq.corrected_checkpoint.recognition import check_pair, found_correction, recorded_correction
from opt8bit.ptq.corrected_checkpoint.writing import Bias, stored_biases, switches_of, write_corrected
from opt8bit.ptq.evaluate import check_token_ids
from opt8bit.ptq.model.bias_places import Place, skipped_by_servers
from opt8bit.ptq.model.blocks import evaluating, matrix
from opt8bit.ptq.model.running import Running, running
from opt8bit.ptq.model.source import Checkpoint, Source
from opt8bit.ptq.pairs.batches import call
from opt8bit.ptq.pairs.rescaled import follow_scales
from opt8bit.ptq.tasks.causal_lm import FEW, PROBED
from opt8bit.ptq.tasks.task import Probe

BATCH = 8  # windows of the calibration that are run together
SAFETENSORS = ".safetensors"
AGAIN = "ask for another correction on top, by again=True or --again"


@dataclass(frozen=True)
class CorrectedCheckpoint:
    """Says what was done to a checkpoint.

    Attributes:
        correction: of the model.
        biases: that were written, by layer.
        switches: names of the configuration's switches that are on for them.
        left: layers that were not to be corrected, and why.
        not_used: what servers do with biases that they do not use, by layer.
        followed: norms and layers whose scales the checkpoint has elsewhere than the float model had.
    """

    correction: Correction
    biases: Mapping[str, Bias]
    switches: list[str]
    left: Mapping[str, str]
    not_used: Mapping[str, str]
    followed: list[str]

    @property
    def bias_bytes(self) -> int:
        """The bytes that biases take beyond what the checkpoint had."""
        return sum(bias.values.nbytes for bias in self.biases.values() if bias.is_new)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as a JSON object."""
        held_out = self.correction.held_out
        return {
            "held_out": None if held_out is None else held_out._asdict(),
            "modules": [asdict(module) for module in self.correction.modules],
            "zeros": [name for name, bias in self.biases.items() if bias.is_zero],
            "bias_bytes": self.bias_bytes,
            "switches": self.switches,
            "not_corrected": {**self.left, **self.correction.skipped},
            "not_used": dict(self.not_used),
            "scales_followed": self.followed,
        }


def correct_checkpoint(
    source: Checkpoint,
    reference: nn.Module | Source | Running,
    calibration: Tensor,
    folder: Path,
    *,
    held_out: Tensor | None = None,
    order: str = "local",
    statistic: str = "mean",
    again: bool = False,
    about: Mapping[str, Any] | None = None,
) -> CorrectedCheckpoint:
    """Adds the biases to a checkpoint that correct its layers' outputs on the average.

    Args:
        source: of the checkpoint, its weights unpacked: ``ptq.Checkpoint(path, unpack=True)``.
        reference: the float model, or a checkpoint of it, whose blocks are read when they are needed. Where the
            quantized one has scales elsewhere, as AWQ's do, blocks are rewritten so that they have them there, too;
            the model computes the same then. It is rewritten in place, and what was read of a checkpoint stays in
            memory.
        calibration: token ids (samples, length), int64.
        folder: to write to; it must be empty.
        held_out: other token ids, by which is chosen what to keep.
        order, statistic: as of :func:`opt8bit.ptq.correct`.
        again: whether a checkpoint that has been corrected before is corrected further.
        about: what else to put into the written record.

    Returns:
        What was done.

    Raises:
        ValueError: an argument is none of these; the checkpoint is corrected already, or was not made of the
            reference; or no layer can be corrected, or none was better for it. Nothing is written.
        ImportError: ``order`` is "sequential" and greenlet is not installed.
        OSError: a file cannot be written.
    """
    others = [file for file in source.files.stored.values() if file.suffix != SAFETENSORS]
    if others:
        raise ValueError(f"biases are added to {SAFETENSORS} files, got {others[0]}")
    _refuse_corrected(recorded_correction(source.files.folder), again)
    quantized, reference = running(source), running(reference)
    check_pair(quantized.model, reference.model)
    _refuse_corrected(found_correction(quantized.model, reference.model), again)
    for name, ids in (("calibration", calibration), ("held_out", held_out)):
        if ids is not None:
            check_token_ids(name, ids, reference.model)
    with evaluating(quantized.model, reference.model):
        followed = follow_scales(quantized, reference, {"input_ids": calibration[:1, :FEW]})
    layers = layers_of(source, quantized, reference, followed.unknown)
    if not layers.corrected:
        name, why = next(iter(layers.left.items()))
        raise ValueError(f"no layer of the checkpoint can be corrected: {name}: {why}, for example")
    correction = correct(
        quantized,
        reference,
        [{"input_ids": part} for part in calibration.split(BATCH)],
        layers=layers.corrected,
        leave=(),
        order=order,
        statistic=statistic,
        held_out=None if held_out is None else [{"input_ids": part} for part in held_out.split(1)],
    )
    kept = _kept(correction)
    biases = stored_biases(source, quantized.model, layers.places, kept)
    skips = {name: skipped_by_servers(source.model, name, layers.places) for name in kept}
    switches: list[Place] = switches_of(layers.places, kept)
    done = CorrectedCheckpoint(
        Correction(correction.modules, correction.skipped, correction.held_out),  # what can be undone keeps the model
        biases,
        [place.name for place in switches],
        layers.left,
        {name: why for name, why in skips.items() if why is not None},
        followed.producers,
    )
    probe = _probe(quantized, biases, calibration[:1])
    write_corrected(source, folder, biases.values(), switches, probe, {**(about or {}), **done.as_json()})
    return done


def _refuse_corrected(why: str | None, again: bool) -> None:
    """
    Raises:
        ValueError: there is a reason, and a correction on top was not asked for.
    """
    if why is not None and not again:
        raise ValueError(f"the checkpoint is corrected already, {why}: {AGAIN}")


def _kept(correction: Correction) -> list[str]:
    """Returns the names of the layers whose biases are kept.

    Raises:
        ValueError: there are none, or one is no bias of its layer.
    """
    kept = [module for module in correction.modules if module.is_kept]
    behind = [module.name for module in kept if module.place == "BiasCompensation"]
    if behind:
        raise ValueError(f"{behind[0]} does not add its bias to its output: no checkpoint can hold its correction")
    if kept:
        return [module.name for module in kept]
    if correction.modules:
        raise ValueError("no correction lowers the loss on the held-out text: the checkpoint is best as it is")
    name, why = next(iter(correction.skipped.items()))
    raise ValueError(f"there is nothing to correct: {name}: {why}, for example")


def _probe(quantized: Running, biases: Mapping[str, Bias], ids: Tensor) -> Probe:
    """Returns what the written checkpoint is checked by; the model gets the biases as they are stored."""
    for name, bias in biases.items():
        layer = quantized.model.get_submodule(name)
        values = bias.values.to(matrix(layer).dtype)
        layer.bias = nn.Parameter(values, requires_grad=False)
    with evaluating(quantized.model):
        logits: Tensor = call(quantized.model, {"input_ids": ids}).logits
    return Probe({"input_ids": ids.clone()}, logits[0, -PROBED:].float())
