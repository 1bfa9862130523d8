"""Loads a written checkpoint as a user does, and compares what it computes with the model that was made.

A checkpoint that would take too much of the memory is loaded with its blocks on disk until they are run.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from opt8bit.ptq.export import format_of
from opt8bit.ptq.export.source_record import SourceRecord, differences, read_record
from opt8bit.ptq.inspect import Contents, UnknownFormat, inspect
from opt8bit.ptq.model import tensor_files
from opt8bit.ptq.model.blocks import evaluating
from opt8bit.ptq.model.checkpoint_files import files_of, headers
from opt8bit.ptq.model.memory import machine_memory
from opt8bit.ptq.model.skeleton import auto_class, device_map, parameters_on_meta
from opt8bit.ptq.model.source import Checkpoint
from opt8bit.ptq.report import FOLDER, PROBE
from opt8bit.ptq.verification import TOLERANCES, Verification
from opt8bit.recipe.registry import FORMATS
from opt8bit.warning import quiet


def verify(
    folder: str | Path,
    *,
    scratch: str | Path | None = None,
    in_parts: bool | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Loads a checkpoint by ``from_pretrained``, runs what it was written with, and compares it to its source.

    What the installed packages do not load, as it is for others, is unpacked here in their place.

    Args:
        folder: that :func:`export` or ``opt8bit compress`` wrote.
        scratch: a folder on a disk with room for the weights of the blocks as transformers unpacks them; by default
            that of temporary files.
        in_parts: whether to leave the blocks on disk until they are run; by default where the whole model would take
            more than half of the machine's memory. What cannot be run so is loaded whole: several grids, and gptq.
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        ValueError: there is nothing to compare with, or transformers cannot load the checkpoint, or not run it.
        ImportError: transformers or accelerate, or what they need for the format, is not installed.
        OSError: there is no room on the disk.
    """
    folder = Path(folder)
    tensors, expected = _read_probe(folder)
    record = read_record(folder) or SourceRecord()
    contents = _contents(folder)
    why = [] if contents is None else contents.not_loaded_here()
    if why:
        written = Checkpoint(folder, trust_remote_code=trust_remote_code, unpack=True)
        found = verify_unpacked(folder, written, trust_remote_code)
        assert contents is not None
        return found._replace(unpacked="; ".join(why), run_error=_run_error(folder, contents, tensors, expected))
    differ = _differences(folder, contents, record, trust_remote_code)
    if in_parts is None:  # by default where the weights, unpacked, would take more than half of the memory
        in_parts = contents is not None and contents.original_bytes > machine_memory() / 2
    if in_parts:
        with suppress(ValueError), TemporaryDirectory(dir=scratch) as unpacked:
            result = _compared(folder, tensors, expected, record, trust_remote_code, unpacked)
            return result._replace(differences=differ, in_parts=True)
    return _compared(folder, tensors, expected, record, trust_remote_code)._replace(differences=differ)


def loads(folder: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Tells whether transformers loads a checkpoint, right or wrong."""
    try:
        _loaded(Path(folder), trust_remote_code, None)
    except Exception:  # whatever it raises
        return False
    return True


def verify_model(
    folder: str | Path, model: Any, dropped: Sequence[str] = (), trust_remote_code: bool = False
) -> Verification:
    """Compares a model that was made of a checkpoint, though not by transformers, to the checkpoint's source.

    Args:
        folder: of the checkpoint.
        model: that was made of it.
        dropped: tensors of the checkpoint that the model has no place for.
        trust_remote_code: as of :func:`verify`.

    Raises:
        ValueError: there is nothing to compare with.
    """
    folder = Path(folder)
    tensors, expected = _read_probe(folder)
    record = read_record(folder) or SourceRecord()
    lost = sorted(set(dropped) - set(record.without_place))
    found = _differences(folder, _contents(folder), record, trust_remote_code)
    return Verification(_error(model, tensors, expected), _tolerance(folder, model), lost, [], found)


def verify_unpacked(folder: Path, written: Checkpoint, trust_remote_code: bool = False) -> Verification:
    """Compares a checkpoint to its source as this package reads it.

    Args:
        folder: of the checkpoint.
        written: the same, opened with ``unpack``.
        trust_remote_code: as of :func:`verify`.

    Raises:
        ValueError: there is nothing to compare with.
    """
    coded, dropped = written.files.coded, written.without_place
    parts = [part for name in dropped for part in ((name,) if coded is None else coded.parts(name))]
    return verify_model(folder, written.copy(), parts, trust_remote_code)


def _read_probe(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs and the logits that a checkpoint was written with.

    Raises:
        ValueError: there are none.
    """
    probe = folder / FOLDER / PROBE
    if not probe.is_file():
        raise ValueError(
            f"{folder} has no {FOLDER}/{PROBE}: only what opt8bit compress or correct has written can be verified"
        )
    with tensor_files.opened(probe) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    if not {"logits", "input_ids"} <= tensors.keys():
        raise ValueError(f"{probe} is damaged: it has {', '.join(sorted(tensors))}")
    expected = tensors.pop("logits")
    return tensors, expected


def _contents(folder: Path) -> Contents | None:
    """Returns what is inside a checkpoint, or None where its format is not written here."""
    try:
        return inspect(folder)
    except UnknownFormat:
        return None


def _differences(folder: Path, contents: Contents | None, record: SourceRecord, trust_remote_code: bool) -> list[str]:
    """Returns what is otherwise than in the source, and whether the tokenizer can be loaded."""
    found = []
    if record.tensors and contents is not None:
        packed = {f"{name}.weight": layer.shape for name, layer in contents.layers.items() if layer.bits}
        format = FORMATS[contents.format]
        found += differences(record, contents.tensors, packed, format.parts, format.keeps_others)
    elif record.tensors:
        stored = {name: header for file in set(files_of(folder).values()) for name, header in headers(file)}
        found += differences(record, stored, {}, ())
    if (folder / "tokenizer_config.json").is_file():
        transformers: Any = importlib.import_module("transformers")
        try:
            transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever transformers raises
            found.append(f"the tokenizer cannot be loaded: {error}")
    return found


def _compared(
    folder: Path,
    inputs: dict[str, Tensor],
    expected: Tensor,
    record: SourceRecord,
    trust_remote_code: bool,
    unpacked: str | None = None,
) -> Verification:
    """Loads the checkpoint, its blocks to be kept in the folder ``unpacked`` or whole, and runs it.

    Raises:
        ValueError: transformers cannot do it.
    """
    try:
        model, info = _loaded(folder, trust_remote_code, unpacked)
        missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
        error = math.inf if missing else _error(model, inputs, expected)
    except (ImportError, OSError):
        raise
    except Exception as failure:  # whatever else transformers raises on a checkpoint is wrong with it
        raise ValueError(f"transformers cannot load {folder}: {failure}") from failure
    dropped = sorted(set(info["unexpected_keys"]) - set(record.without_place))
    return Verification(error, _tolerance(folder, model), dropped, missing)


def _error(model: Any, inputs: dict[str, Tensor], expected: Tensor) -> float:
    with evaluating(model):
        found = model(**inputs).logits[0, -len(expected) :].float()
    return float((found - expected).abs().max() / expected.std())


def _run_error(folder: Path, contents: Contents, inputs: dict[str, Tensor], expected: Tensor) -> float | None:
    """Returns how far the logits behind the last token are apart in the program that reads the checkpoint's format.

    Raises:
        ValueError: it does not run the checkpoint.
    """
    found = FORMATS[contents.format].log_probabilities(folder, inputs["input_ids"][0])
    if found is None:
        return None
    return float((found - expected[-1].log_softmax(-1)).abs().max() / expected.std())


def _loaded(folder: Path, trust_remote_code: bool, unpacked: str | None) -> tuple[Any, dict[str, Any]]:
    """Returns the model, and what transformers found on loading it."""
    transformers: Any = importlib.import_module("transformers")
    importlib.import_module("accelerate")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    model_class = auto_class(config)
    if unpacked is not None:
        options |= _offloading(config, unpacked, trust_remote_code)
    with quiet("accelerate.big_modeling"):  # that parameters are on disk is what was asked for
        return model_class.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True, **options
        )


def _offloading(config: Any, unpacked: str, trust_remote_code: bool) -> dict[str, Any]:
    """Returns arguments by which transformers leaves the blocks on disk, unpacked, or none where it cannot."""
    quantization: dict[str, Any] | None = getattr(config, "quantization_config", None)
    format = format_of({"quantization_config": quantization})
    options = None if format is None else format.load_options(quantization)
    if options is None:
        return {}
    with parameters_on_meta():
        skeleton = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    for name, value in options.items():
        setattr(config, name, value)
    return {"config": config, "device_map": device_map(skeleton), "offload_folder": unpacked}


def _tolerance(folder: Path, model: Any) -> float:
    config = json.loads((folder / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name) if isinstance(name, str) else model.dtype
    found = TOLERANCES.get(dtype, max(TOLERANCES.values()))
    format = format_of(config)
    decoded_in = None if format is None else format.decoded_in
    return found if decoded_in is None else max(found, TOLERANCES[decoded_in])
