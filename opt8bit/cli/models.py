"""Language models, as the commands take them. No pickle is read, and no remote code run unless asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from opt8bit.cli.errors import CommandError
from opt8bit.ptq.model.checkpoint_files import CONFIG, CheckpointFiles
from opt8bit.ptq.model.origin import refuse_made_up, refuse_other_classes
from opt8bit.ptq.model.quantization_header import header_of
from opt8bit.ptq.model.scaled import read_json
from opt8bit.ptq.model.skeleton import OnlyWhole, auto_class
from opt8bit.ptq.model.source import Checkpoint, LoadedCheckpoint, Source
from opt8bit.recipe.registry import FORMATS

# Weights in other formats that lie beside a model on the hub.
OF_OTHERS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.ot", "*.tflite", "consolidated*"]


def transformers() -> Any:
    """
    Raises:
        CommandError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CommandError(f"{error.name or 'transformers'} is missing: pip install 'opt8bit[compress]'") from error


def load(name: str, *, trust_remote_code: bool = False) -> Any:
    """Returns a causal language model, in its own dtype and in memory.

    Args:
        name: a folder with a checkpoint in safetensors, or the id of a model on the hub.
        trust_remote_code: whether Python files that come with the model may run.

    Raises:
        CommandError: it cannot be loaded.
    """
    place = _place(name)
    if _is_scaled(Path(place)):  # transformers would quantize the inputs of its layers, too, and wants a GPU for that
        return open_model(name, trust_remote_code=trust_remote_code).copy()
    if _is_for_others(Path(place)):
        return open_unpacked(name, trust_remote_code=trust_remote_code).copy()
    return _loaded(place, name, trust_remote_code)


def _is_scaled(folder: Path) -> bool:
    """Tells whether the weights in a folder are codes in 8 bits that are only scaled."""
    try:
        return folder.is_dir() and CheckpointFiles(folder).coded is not None
    except ValueError:  # they are more than that, or a file is damaged, which transformers tells
        return False


def _is_for_others(folder: Path) -> bool:
    """Tells whether the checkpoint in a folder is of a format of this package that transformers does not load."""
    try:
        header = header_of(read_json(folder / CONFIG) or {}) or {}
    except ValueError:  # the file is damaged, which transformers tells
        return False
    format = FORMATS.get(f"{header.get('quant_method')}")
    return format is not None and not format.is_read_by_transformers


def open_model(name: str, *, trust_remote_code: bool = False, dtype: str | None = None) -> Source:
    """Returns a model whose blocks are read from its files when they are asked for.

    It is in memory where only transformers knows how its files make a model. Arguments and errors are as in
    :func:`load`; ``dtype`` is the name of another one than the model's own, such as "bfloat16".
    """
    computed_in: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    transformers()
    folder = _folder(name)
    try:
        return Checkpoint(folder, trust_remote_code=trust_remote_code, dtype=computed_in)
    except OnlyWhole:
        return _loaded_whole(folder, name, trust_remote_code, computed_in)
    except Exception as error:  # a model is anyone's, and so is what transformers raises on it
        raise _cannot_load(name, error) from error


def open_unpacked(name: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Returns a model whose weights are packed as one with the weights that it computes with.

    Arguments and errors are as in :func:`load`.
    """
    transformers()
    folder = _folder(name)
    try:
        return Checkpoint(folder, trust_remote_code=trust_remote_code, unpack=True)
    except OnlyWhole as error:
        why = "transformers makes this model's weights of several of the checkpoint's, which packed ones do not allow"
        raise CommandError(f"cannot load {name!r}: {error}: {why}") from error
    except Exception as error:
        raise _cannot_load(name, error) from error


def _folder(name: str) -> Path:
    """Returns a checkpoint's folder, downloaded if need be.

    Raises:
        CommandError: there is none.
    """
    folder = Path(_place(name))
    if folder.is_dir():
        return folder
    try:
        download = importlib.import_module("huggingface_hub").snapshot_download
        return Path(download(name, ignore_patterns=OF_OTHERS))
    except Exception as error:  # of the network, of the hub, of the disk
        raise _cannot_load(name, error) from error


def _loaded_whole(folder: Path, name: str, trust_remote_code: bool, dtype: torch.dtype | None) -> Source:
    """
    Raises:
        CommandError: it cannot be loaded.
    """
    model = _loaded(str(folder), name, trust_remote_code, dtype)
    try:
        return LoadedCheckpoint(folder, model, dtype)
    except ValueError as error:
        raise _cannot_load(name, error) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """
    Raises:
        CommandError: there is none, or it cannot be loaded.
    """
    library, place = transformers(), _place(name)
    try:
        return library.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _cannot_load(f"the tokenizer of {name}", error) from error


def _place(name: str) -> str:
    """Returns where transformers finds a model: a folder, or a name on the hub.

    Raises:
        CommandError: it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CommandError(f"{name!r} has no config.json")
    if (folder / "adapter_config.json").is_file():
        raise CommandError(
            f"{name!r} has an adapter, adapter_config.json: merge it into its base and save what PEFT's "
            "merge_and_unload() returns"
        )
    if not folder.exists() and name.startswith((".", "~", "/")):
        raise CommandError(f"there is no folder {name!r}")
    return str(folder) if folder.is_dir() else name


def _loaded(place: str, name: str, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Any:
    library = transformers()
    try:
        config = library.AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        refuse_other_classes(config)
        model, about = auto_class(config).from_pretrained(
            place,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        refuse_made_up(about["missing_keys"], about["unexpected_keys"])
    except Exception as error:
        raise _cannot_load(name, error) from error
    return model.eval()


def _cannot_load(name: str, error: Exception) -> CommandError:
    lines = str(error).strip().splitlines()
    return CommandError(f"cannot load {name!r}: {lines[0] if lines else type(error).__name__}")
