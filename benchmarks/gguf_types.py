"""How good are weights in the types of llama.cpp's files, rounded here and by llama.cpp's own quantizer?

    pip install ".[compress,gguf]" xllamacpp
    python benchmarks/gguf_types.py MODEL --calibration FILE --test FILE [--types Q4_K Q3_K]

For each type all layers of the model's blocks are stored as it, or as the type that llama.cpp falls back to where it
does not divide their rows, so that both take the same bytes. Embeddings and head stay as they are. Ours is what
``compress`` does when it is told nothing. llama.cpp's is ``ggml_quantize_chunk`` of the library in the package
xllamacpp, with the importance matrix that llama-imatrix computes: the mean square of each input of a layer. Where the
package is not installed, ours is measured alone.

Two figures: perplexity on windows of the test text, computed in torch from the decoded weights; and, for the first
layers whose rows the type divides, the layer objective ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` with H of the float model's inputs,
ours divided by llama.cpp's. A run that has a row is not repeated.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compress import QUICK_SIZES, SIZES, divergence
from measuring import arguments, complete
from peers import imported
from torch import Tensor, nn

from opt8bit import ptq
from opt8bit.cli.models import load, load_tokenizer
from opt8bit.cli.texts import find_text, first_windows
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.model.blocks import block_layers, matrix
from opt8bit.ptq.model.gguf.grids import scheme_of_type
from opt8bit.ptq.model.source import digest
from opt8bit.ptq.plan import rounder_of
from opt8bit.ptq.rounding.rounder import objective
from opt8bit.recipe import Recipe
from opt8bit.recipe.gguf_types import GGUF_TYPES

gguf, xllamacpp = imported("gguf"), imported("xllamacpp")
QUICK_TYPES = ["Q4_1", "Q3_K"]
LAYERS = 6  # whose objective is computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a checkpoint in safetensors, or id of the hub")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--types", nargs="+", choices=GGUF_TYPES, help="(default all)")
    parser.add_argument("--samples", type=int, help=f"windows of calibration (default {SIZES['samples']})")
    parser.add_argument("--windows", type=int, help=f"windows of the perplexity (default {SIZES['windows']})")
    parser.add_argument("--length", type=int, help=f"tokens of a window (default {SIZES['length']})")
    options = arguments(parser, "gguf_types")
    usual = QUICK_SIZES if options.quick else SIZES
    sizes = {name: getattr(options, name) or size for name, size in usual.items()}
    tokenizer, length = load_tokenizer(options.model), sizes["length"]
    texts = {
        "calibration": first_windows(find_text(options.calibration), tokenizer, length, sizes["samples"]),
        "test": first_windows(find_text(options.test), tokenizer, length, sizes["windows"]),
    }
    common = {"model": Path(options.model).name, **sizes}
    common |= {f"{name}_digest": digest([text]) for name, text in texts.items()}
    kinds = options.types or (QUICK_TYPES if options.quick else list(GGUF_TYPES))
    programs = ["opt8bit"] if library() is None else ["opt8bit", "llama.cpp"]
    wanted = [{**common, "type": None, "program": "as it is"}]
    wanted += [{**common, "type": kind, "program": program} for kind in kinds for program in programs]

    @cache
    def inputs() -> dict[str, Tensor]:
        return moments(load(options.model), texts["calibration"])

    def measure(**about: Any) -> list[dict[str, Any]]:
        model = load(options.model)
        started = time.perf_counter()
        rounded = ROUNDED[about["program"]](model, about["type"], texts["calibration"], inputs)
        found = {"seconds": time.perf_counter() - started, "test": ptq.perplexity(rounded, texts["test"])}
        found["divergence"] = divergence(rounded, load(options.model), texts["test"])
        print(f"{about['type']} by {about['program']}: {found}", flush=True)
        return [found]

    show(complete(options.rows, wanted, measure))
    if len(programs) > 1:
        rows = options.rows.with_name(f"{options.rows.stem}_layers.jsonl")
        asked = [{**common, "type": kind} for kind in kinds]
        show_layers(complete(rows, asked, lambda **about: ratios(load(options.model), about["type"], inputs())))


def as_it_is(model: nn.Module, *_: Any) -> nn.Module:
    return model


def ours(model: nn.Module, kind: str, calibration: Tensor, _: Any) -> nn.Module:
    return ptq.compress(model, calibration, grid=kind).compressed_model()


@torch.no_grad()
def llama_cpps(model: nn.Module, kind: str, _: Tensor, inputs: Any) -> nn.Module:
    for name, layer in block_layers(model).items():
        weight = matrix(layer)
        weight.copy_(by_llama_cpp(weight, kind, inputs()[name].diagonal()))
    return model


ROUNDED = {"as it is": as_it_is, "opt8bit": ours, "llama.cpp": llama_cpps}


@cache
def library() -> Any:
    """Returns llama.cpp's library as xllamacpp has it, or None where it is not installed."""
    if xllamacpp is None or gguf is None:
        return None
    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return found


def by_llama_cpp(weight: Tensor, kind: str, importance: Tensor) -> Tensor:
    """Returns a weight as llama.cpp rounds it, (out, in), in the type that it takes for rows of that length."""
    about = GGUF_TYPES[kind]
    if about.fallback is not None and weight.shape[1] % about.block:
        return by_llama_cpp(weight, about.fallback, importance)
    number = gguf.GGMLQuantizationType[kind]
    rows, importance = weight.float().contiguous(), importance.float().contiguous()
    packed = np.zeros((len(rows), rows.shape[1] // about.block * about.block_bytes), np.uint8)
    addresses = rows.data_ptr(), packed.ctypes.data
    library().ggml_quantize_chunk(int(number), *addresses, 0, *rows.shape, importance.data_ptr())
    return torch.from_numpy(gguf.quants.dequantize(packed, number))


@torch.no_grad()
def moments(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Returns E[x xᵀ] of the inputs of each layer of the blocks, float32 (in, in)."""
    layers = block_layers(model)
    found = {name: torch.zeros(matrix(layer).shape[1], matrix(layer).shape[1]) for name, layer in layers.items()}

    names = {layer: name for name, layer in layers.items()}

    def add(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        found[names[layer]].addmm_(rows.T, rows, alpha=1 / windows.numel())

    for layer in layers.values():
        layer.register_forward_pre_hook(add)
    for window in windows:
        model(input_ids=window[None])
    return found


def ratios(model: nn.Module, kind: str, inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Returns the objectives of the first layers whose rows a type divides."""
    layers = block_layers(model).items()
    fitting = [(name, layer) for name, layer in layers if matrix(layer).shape[1] % GGUF_TYPES[kind].block == 0]
    rounder, scheme = rounder_of(Recipe()), scheme_of_type(kind, "mse")
    rows = []
    for name, layer in fitting[:LAYERS]:
        weight, hessian = matrix(layer).detach().float(), inputs[name].double()
        rounded = rounder.round(weight, InputStatistics(hessian), scheme).dequantize()
        theirs = by_llama_cpp(weight, kind, hessian.diagonal())
        errors = [float(objective(weight, each, hessian)) for each in (rounded, theirs)]
        rows.append({"layer": name, "ours": errors[0], "theirs": errors[1], "ratio": errors[0] / errors[1]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\nas it is: perplexity {rows[0]['test']:.3f}")
    programs = list(dict.fromkeys(row["program"] for row in rows[1:]))
    print(f"{'type':<8}{'bits/weight':>12}" + "".join(f"{program:>24}" for program in programs))
    for kind, found in by_type(rows[1:]):
        each = [f"{row['test']:>12.3f}, KL {row['divergence']:7.4f}" for row in found]
        print(f"{kind:<8}{GGUF_TYPES[kind].bits_per_weight:>12.4f}" + "".join(f"{text:>24}" for text in each))


def show_layers(rows: list[dict[str, Any]]) -> None:
    print("\nobjective of single layers, ours / llama.cpp's")
    for kind, found in by_type(rows):
        each = sorted(row["ratio"] for row in found)
        print(f"{kind:<8}{each[0]:.3f} to {each[-1]:.3f}, {len(each)} layers")


def by_type(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    rows = list(rows)
    for kind in dict.fromkeys(row["type"] for row in rows):
        yield kind, [row for row in rows if row["type"] == kind]


if __name__ == "__main__":
    main()
