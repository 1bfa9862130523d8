"""Compresses one tiny model, loads the result plainly and compares it with the original, for ``architectures.py``."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from checkpoint_comparison import Wrong, compare_configurations, compare_files, tensors_of
from tiny_models import FIRST_SPECIAL, FIRST_WORD, tiny_model, tiny_tokenizer
from torch import Tensor

import opt8bit
from opt8bit import ptq
from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import open_model
from opt8bit.cli.texts.prefix import tokens
from opt8bit.ptq.evaluate import windows
from opt8bit.ptq.export import write
from opt8bit.ptq.model.passes import Refused

BITS = 8
LENGTH, SAMPLES, HELD_OUT = 48, 8, 2  # windows are three times as long as the tiny models' sliding ones
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 2, 24, 8
# Of the logits' standard deviation. Weights rounded to 8 bits are off by half a percent of their own spread, and a few
# layers add up to less than 5%; the median over tokens leaves out those that a router sends to another expert.
ROUNDING = 0.1
EXACT = 2e-3  # sums in another order, in float32
LATE = ("_run_block", "write", "export", "verify")  # functions that run when calibration has begun

PACKAGE = str(Path(opt8bit.__file__).parent)


class NotBuilt(Exception):
    """Transformers itself cannot make, run, save or load the tiny model."""


@dataclass
class Original:
    """A checkpoint, and what transformers makes of it."""

    folder: Path
    class_name: str
    logits: Tensor  # (PROMPTS, LENGTH, vocabulary)
    generated: dict[bool, list[list[int]]] = field(default_factory=dict)  # with a cache, and without
    note: str = ""


def examine(model_type: str, formats: list[str]) -> list[dict[str, Any]]:
    """Returns a row for each format."""
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            original = built(model_type, Path(scratch) / "original")
        except Exception as error:
            return [{"format": each, "result": "not built", **told(error)} for each in formats]
        return [examined(original, each, Path(scratch) / each) for each in formats]


def built(model_type: str, folder: Path) -> Original:
    """Makes, saves and loads a tiny model.

    Raises:
        Exception: whatever transformers raises; and ``NotBuilt``.
    """
    model = tiny_model(model_type)
    logits = logits_of(model)
    if not bool(torch.isfinite(logits).all()):
        raise NotBuilt("logits are not finite")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    loaded, info = load(folder)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise NotBuilt(f"saved and loaded, it has {len(info[kind])} {kind}, {min(map(str, info[kind]))} first")
    if difference(logits_of(loaded), logits) > EXACT:
        raise NotBuilt("saved and loaded, it computes something else")
    original = Original(folder, type(loaded).__name__, logits)
    try:
        original.generated = generated(loaded)
    except Exception as error:
        original.note = f"does not generate: {told(error)['why']}"
    if original.generated and original.generated[True] != original.generated[False]:
        original.note = "the original itself generates other tokens with a cache than without"
    return original


def examined(original: Original, format: str, folder: Path) -> dict[str, Any]:
    """Compresses and compares; returns what came of it."""
    row: dict[str, Any] = {"class": original.class_name, "format": format, "note": original.note}
    try:
        result = compressed(original, format)
        row["share"] = round(result.weights / sum(param.numel() for param in result.model.parameters()), 3)
        with stage("export"):
            folder.mkdir()
            write(result, folder, format, tiny_tokenizer())
        row |= compared(original, result, format, folder)
    except Wrong as error:
        return {**row, "result": "wrong", "why": str(error)}
    except Exception as error:
        kind = "refused" if is_refusal(error) else "crash"
        return {**row, "result": kind, **told(error)}
    return {**row, "result": "whole", "why": ""}


def compressed(original: Original, format: str) -> Any:
    """Runs what ``opt8bit compress --bits 8`` does."""
    words = torch.randint(
        FIRST_WORD, FIRST_SPECIAL, ((SAMPLES + HELD_OUT) * LENGTH,), generator=torch.Generator().manual_seed(2)
    )
    text = tokens(" ".join(f"w{word}" for word in words.tolist()), tiny_tokenizer())
    samples = windows(text, LENGTH, SAMPLES + HELD_OUT)
    source = open_model(str(original.folder))
    return ptq.compress(source, samples[:SAMPLES], bits=BITS, held_out=samples[SAMPLES:], checkpoint_format=format)


def compared(original: Original, result: Any, format: str, folder: Path) -> dict[str, Any]:
    """What was measured of a written checkpoint.

    Raises:
        Wrong: it differs from the original by more than rounding.
    """
    compare_files(tensors_of(original.folder), tensors_of(folder), packed=format != "dense")
    compare_configurations(original.folder, folder)
    loaded, info = load(folder)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise Wrong(f"loaded, it has {len(info[kind])} {kind}, {min(map(str, info[kind]))} first")
    logits = logits_of(loaded)
    exact = difference(logits, logits_of(result.compressed_model()))
    if exact > EXACT:
        raise Wrong(f"loaded, its logits are {exact:.1e} of their spread from those of the model that was written")
    error = difference(logits, original.logits)
    if error > ROUNDING:
        raise Wrong(f"logits are {error:.2f} of their spread from the original's")
    verification = ptq.verify(folder)
    if not verification.is_right:
        raise Wrong(f"verify: {str(verification).splitlines()[0]}")
    compare_generated(original, loaded)
    return {"error": error}


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    # Without a dtype, transformers 4 loads compressed-tensors in float16, whatever they were saved in.
    auto_class: Any = transformers.AutoModelForCausalLM
    model, info = auto_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model.eval(), info


def prompts(length: int) -> Tensor:
    return torch.randint(FIRST_WORD, FIRST_SPECIAL, (PROMPTS, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=prompts(LENGTH)).logits.float()


def difference(logits: Tensor, expected: Tensor) -> float:
    """The root mean square of a token's differences, relative to the logits' spread: the median over tokens."""
    if logits.shape != expected.shape:
        raise Wrong(f"logits are {tuple(logits.shape)}, the original's {tuple(expected.shape)}")
    by_token = (logits - expected).square().mean(-1).sqrt()
    found = float(by_token.median() / expected.std())
    return float("inf") if math.isnan(found) else found


def generated(model: Any) -> dict[bool, list[list[int]]]:
    """Greedily, with a cache and without."""
    ids = prompts(PROMPT_LENGTH)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return {
            cached: model.generate(ids, attention_mask=mask, use_cache=cached, pad_token_id=0, **options).tolist()
            for cached in (True, False)
        }


def compare_generated(original: Original, loaded: Any) -> None:
    if not original.generated:
        return
    found = generated(loaded)
    if original.generated[True] == original.generated[False] and found[True] != found[False]:
        raise Wrong("with a cache it generates other tokens than without, which the original does not")
    length = len(original.generated[True][0])
    if any(len(sequence) != length for sequence in found[True]):
        raise Wrong(f"it generates {len(found[True][0])} tokens where the original generates {length}")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Marks what is raised inside as of that stage."""
    try:
        yield
    except Exception as error:
        error.__dict__["stage"] = name
        raise


def is_refusal(error: BaseException) -> bool:
    """Whether it is a message of opt8bit's own, given before calibration began."""
    if error.__cause__ is not None and not isinstance(
        error, Refused
    ):  # what is raised again, with a name before it, is no message of its own
        return is_refusal(error.__cause__)
    frames = traceback.extract_tb(error.__traceback__)
    is_own = isinstance(error, CommandError | ValueError | TypeError) and frames[-1].filename.startswith(PACKAGE)
    return is_own and not any(frame.name in LATE and frame.filename.startswith(PACKAGE) for frame in frames)


def told(error: BaseException) -> dict[str, str]:
    """The first line of what an error says, and the functions it came from."""
    lines = str(error).strip().splitlines()
    why = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]
    if not isinstance(error, CommandError | NotBuilt):
        why = f"{type(error).__name__}: {why}"
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    frames = traceback.extract_tb(inner.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    places = [f"{Path(frame.filename).name}:{frame.lineno}:{frame.name}" for frame in (*own[-1:], *frames[-1:])]
    return {"why": why, "where": " < ".join(dict.fromkeys(reversed(places)))}
