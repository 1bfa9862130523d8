"""Writes a packed checkpoint in another layout, with the same codes and scales where that holds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opt8bit.ptq.conversion.check import check_same
from opt8bit.ptq.conversion.codes import Carried, relative_error
from opt8bit.ptq.conversion.target import Target, packed_layers, target_of
from opt8bit.ptq.corrected_checkpoint.recognition import RECORD as CORRECTION
from opt8bit.ptq.export import About, write, write_model_card
from opt8bit.ptq.export.configuration import write_configuration
from opt8bit.ptq.export.folder import new_folder
from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.model.checkpoint_files import CONFIG
from opt8bit.ptq.model.packed.checkpoint import Packed
from opt8bit.ptq.model.packed.gguf import GGUFLayout
from opt8bit.ptq.model.packed.mlx import MLXLayout
from opt8bit.ptq.model.source import Checkpoint
from opt8bit.ptq.outside import Outside
from opt8bit.ptq.report import FOLDER, LAYERS, PROBE, RECIPE, REPORT, RUN, read_report, valid_json
from opt8bit.ptq.result import Result
from opt8bit.quant.weight import QuantizedWeight
from opt8bit.recipe.registry import FORMATS
from opt8bit.warning import first_of

LISTED = 4
RECORD = "conversion.json"  # in FOLDER
KEPT = (REPORT, LAYERS, PROBE, RECIPE, RUN, CORRECTION)  # what is still true of the same weights
HEADERS = ("quantize_config.json", "quantization_config.json")  # of GPTQModel and AutoRound, beside the configuration
OF_MLX = "quantization"  # what mlx-lm calls the header


@dataclass(frozen=True)
class Conversion:
    """Says what was converted.

    Attributes:
        path: of the folder that was written.
        format: of it.
        layers: how many packed layers there are.
        group_sizes: that layers had, and have, where groups were cut into smaller ones with the same scales.
        again: layers that were rounded again, and why.
        errors: of their weights, squared, relative to the square of the weight before.
    """

    path: Path
    format: str
    layers: int
    group_sizes: tuple[tuple[int, int], ...] = ()
    again: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)


def convert(
    source: Checkpoint | str | Path,
    path: str | Path,
    *,
    format: str,
    round_again: bool = False,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Conversion:
    """Writes a packed checkpoint in another layout.

    Codes, scales and zero points stay as they are stored, and so do all other tensors: what was written is read again
    and compared before the folder gets its name. Groups that are larger than the format has are cut, each part with the
    scale of the whole. "dense" gets the values that the packed weights stand for, in the model's own dtype.

    Args:
        source: a folder with a checkpoint in the layout of compressed-tensors (pack-quantized), GPTQ, AWQ, AutoRound or
            MLX, whoever wrote it; or the same opened with ``ptq.Checkpoint(folder, unpack=True)``.
        path: the folder to make; it must not exist.
        format: "compressed-tensors", "gptq", "mlx", "gguf" or "dense".
        round_again: whether layers that the format cannot hold as they are, are rounded to nearest once more.
        trust_remote_code: whether Python files that come with the model may run.
        name: of the source, for the model card, if not that of its folder.

    Returns:
        What was done.

    Raises:
        FileExistsError: there is something at ``path``.
        ValueError: there is no such format, the source is not packed, or the format cannot hold a layer as it is and
            ``round_again`` is not set, or not at all. The message names the layer and the reason. Nothing is written.
        ImportError: a package that the format needs is not installed.
        OSError: it cannot be written; nothing is left.
    """
    FORMATS.check(format)
    with new_folder(Path(path)) as folder:
        if not isinstance(source, Checkpoint):
            source = Checkpoint(source, trust_remote_code=trust_remote_code, unpack=True)
        _check_source(source)
        target = target_of(source, format)
        if target.again and not round_again:
            raise ValueError(_refusal(format, target.again))
        carried = _carried(source, target, format)
        result = Result(source, target.plan, {}, carried, target.report)
        write(result, folder, format)
        _tidy(source, folder, format)
        errors = _errors(source, result, carried)
        check_same(source.files, folder, [str(source.stored_name(weight)) for weight in errors])
        done = Conversion(
            Path(path), format, len(target.kinds), _cut(target), target.again, dict(sorted(errors.items()))
        )
        _record(source, folder, done, name)
        _write_card(source, result, folder, done, name)
    return done


def _check_source(source: Checkpoint) -> None:
    """
    Raises:
        ValueError: it is not packed, or a GGUF file.
    """
    coded = source.files.coded
    if not isinstance(coded, Packed):
        raise ValueError(f"{source.files.folder} is not packed: opt8bit compress rounds weights")
    if isinstance(coded.layout, GGUFLayout):
        raise ValueError(f"{source.files.folder} is a GGUF file, which is not converted: convert what it was made of")


def _refusal(format: str, again: Mapping[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, why in again.items():
        reasons.setdefault(why, []).append(name or "outside of the blocks")
    lines = [f"{first_of(names, LISTED)}: {why}" for why, names in reasons.items()]
    said = f"{format} does not hold these as they are, which round_again=True or --round-again rounds once more:"
    return "\n  ".join([said, *lines])


def _carried(source: Checkpoint, target: Target, format: str) -> Carried:
    """Returns the weights of the source on the grids of the format."""
    names = packed_layers(source)
    outside = FORMATS[format].outside
    return Carried(
        source.files,
        {f"{name}.weight": there for name, there in names.items()},
        {f"{name}.weight": scheme for name, scheme in target.schemes.items()},
        {f"{name}.weight" for name in target.again},
        {f"{name}.weight" for name in target.refitted},
        Outside(source.model, outside).changes,
    )


def _errors(source: Checkpoint, result: Result, carried: Carried) -> dict[str, float]:
    """Returns the errors of all weights that were rounded, by the names of the model's parameters."""
    errors = dict(carried.errors)
    prefix = f"{find_blocks(source.model)[0]}."
    for name in result.changes:
        if not name.startswith(prefix):
            change = result.changes[name]
            assert isinstance(change, QuantizedWeight)
            errors[name] = relative_error(change, source.model.get_parameter(name))
    return errors


def _cut(target: Target) -> tuple[tuple[int, int], ...]:
    """Returns the sizes of groups that were cut, before and after."""
    found = set()
    for name, scheme in target.schemes.items():
        kind = target.kinds[name]
        size = scheme.group_size or kind.shape[1]
        if size != kind.group_size:
            found.add((kind.group_size, size))
    return tuple(sorted(found))


def _tidy(source: Checkpoint, folder: Path, format: str) -> None:
    """Deletes what else says how the source is packed."""
    for name in HEADERS:
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    coded = source.files.coded
    if isinstance(coded, Packed) and isinstance(coded.layout, MLXLayout) and format != "mlx":
        del config[OF_MLX]
        write_configuration(config, folder)


def _record(source: Checkpoint, folder: Path, done: Conversion, name: str | None) -> None:
    """Writes what was done; and, where nothing was rounded again, what is known of the source and still true."""
    if not done.errors:
        for kept in KEPT:
            if (source.files.folder / FOLDER / kept).is_file():
                shutil.copyfile(source.files.folder / FOLDER / kept, folder / FOLDER / kept)
    about = {"source": name or source.files.folder.name, "format": done.format, "layers": done.layers}
    again = {layer or "outside": why for layer, why in done.again.items()}
    record = {**about, "group_sizes": done.group_sizes, "rounded_again": again, "errors": dict(done.errors)}
    (folder / FOLDER / RECORD).write_text(valid_json(record, indent=2) + "\n", encoding="utf-8")


def _write_card(source: Checkpoint, result: Result, folder: Path, done: Conversion, name: str | None) -> None:
    """Writes the model card, with the figures of the compression that the codes are from, where they are known."""
    report = read_report(folder) if (folder / FOLDER / REPORT).is_file() else None
    run_file = folder / FOLDER / RUN
    run: dict[str, Any] = json.loads(run_file.read_text(encoding="utf-8")) if run_file.is_file() else {}
    if report is not None and not (folder / FOLDER / CORRECTION).is_file():  # which the figures are from before
        result.quality = report.held_out
    named = name or source.files.folder.name
    said = "Codes and scales" if not done.errors else "Codes and scales, some of them rounded again,"
    text = run.get("calibration")
    about = About(
        name=done.path.absolute().name,
        base=name if report is None else str(report.about["model"]),
        text=None if text is None else Path(text).name if Path(text).exists() else text,
        recipe={} if report is None else report.about["recipe"],
        what=f"{said} of {named}, converted by opt8bit to the format {done.format}.",
        measured=run.get("measured_by", {}),
    )
    write_model_card(result, folder, done.format, about)
