"""What does Bias Compensation bring to a language model that another tool has quantized, and what does it cost?

    pip install ".[compress,demo,peers]"
    python benchmarks/correct_peers.py MODEL --calibration FILE --test FILE [--checkpoint NAME=FOLDER ...]

``opt8bit.ptq.correct`` with both orders: perplexity before, with all corrections, and with those that the held-out
choice keeps. Windows of the calibration text are drawn, other ones for each seed, and those held out are not among
them; the windows of the perplexity are those of compress.py, and nothing was chosen by them. Times of ``correct``,
without the choice, are compared with one pass of the float model over the same batches ("local") and with one pass of
each model ("sequential").

Packages that are not installed have no row. Checkpoints in packed layouts, such as ``peer_llmcompressor.py --output``
and ``peer_autoround.py`` write, are unpacked as ``opt8bit correct`` does. A run that has a row is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import arguments, complete, seconds
from peers import imported
from torch import Tensor, nn

from opt8bit import ptq
from opt8bit.cli.models import load, load_tokenizer, open_unpacked
from opt8bit.cli.texts import choose_windows, find_text, first_windows
from opt8bit.ptq.model.blocks import block_layers, evaluating, matrix
from opt8bit.ptq.model.running import Running
from opt8bit.ptq.pairs.batches import call, target_of
from opt8bit.ptq.pairs.choice import LOSSES, HeldOut, Judge, choose
from opt8bit.quant import UniformGrid

SIZES = {"samples": 64, "held_out": 8, "windows": 20, "length": 512}
QUICK_SIZES = {"samples": 4, "held_out": 2, "windows": 2, "length": 64}
BATCH = 4  # windows that are run together
ORDERS = ("local", "sequential")
GROUP = 64  # weights that share a scale, where the tool lets one say


def fake_rtn(place: str) -> Any:
    """Rounds to nearest, 3 bits between the least and the largest weight of each group."""
    model, grid = load(place), UniformGrid(3)
    for layer in block_layers(model).values():
        weight = matrix(layer)
        groups = weight.unflatten(1, (-1, GROUP))
        weight.copy_(grid.nearest(groups, grid.fit(groups)).flatten(1))
    return model


def torchao_int4(place: str) -> Any:
    package, model = importlib.import_module("torchao.quantization"), load(place)
    dtype: Any = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    config = package.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=package.PerGroup(GROUP))
    layers = block_layers(model)
    package.quantize_(model, config, filter_fn=lambda module, name: name in layers)
    return model


def quanto(kind: str) -> Callable[[str], Any]:
    def quantize(place: str) -> Any:
        package, model = importlib.import_module("optimum.quanto"), load(place)
        package.quantize(model, weights=getattr(package, kind), include=list(block_layers(model)))
        package.freeze(model)
        return model

    return quantize


def bitsandbytes_nf4(place: str) -> Any:
    import transformers

    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        place, dtype=torch.float32, device_map="cpu", quantization_config=how
    )
    return model.eval()


class Peer(NamedTuple):
    package: str  # that has to be installed; nothing where it is none
    module: str
    quantized: Callable[[str], Any]  # from the float model's folder


PEERS = {
    "RTN, 3 bits, fake": Peer("", "", fake_rtn),
    "torchao int4": Peer("torchao", "torchao", torchao_int4),
    "quanto qint4": Peer("optimum-quanto", "optimum.quanto", quanto("qint4")),
    "quanto qint2": Peer("optimum-quanto", "optimum.quanto", quanto("qint2")),
    "bitsandbytes nf4": Peer("bitsandbytes", "bitsandbytes", bitsandbytes_nf4),
}
QUICK_PEERS = ["RTN, 3 bits, fake"]


def main() -> None:
    options, sizes = parsed()
    folders = dict(each.split("=", 1) for each in options.checkpoint)
    peers = QUICK_PEERS if options.quick else [name for name, peer in PEERS.items() if is_there(peer)]
    names = options.only or [*peers, *folders]
    run = Run(options, folders, sizes)
    common = {"model": Path(options.model).name, **sizes}
    wanted = [
        {**common, "quantizer": name, "seed": seed, "order": order}
        for name, seed, order in itertools.product(names, options.seeds, options.orders)
    ]
    show(complete(options.rows, wanted, run.measure))


def parsed() -> tuple[argparse.Namespace, dict[str, int]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with the float checkpoint in safetensors")
    parser.add_argument("--calibration", required=True, help="text to calibrate and to choose on")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FOLDER", help="packed, any number")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="quantizers to measure (default all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the windows, not 0 (default 1 2 3)")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS, help="(default both)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"(default {size})")
    options = arguments(parser, "correct_peers")
    options.seeds = options.seeds or ([1] if options.quick else [1, 2, 3])
    usual = QUICK_SIZES if options.quick else SIZES
    return options, {name: getattr(options, name) or size for name, size in usual.items()}


def is_there(peer: Peer) -> bool:
    return not peer.module or imported(peer.module) is not None


class Run:
    """What the measurements share: the float model, the texts, and the quantized model that is at hand."""

    def __init__(self, options: argparse.Namespace, folders: dict[str, str], sizes: dict[str, int]) -> None:
        self.place, self.seeds = options.model, options.seeds
        self.folders, self.sizes = folders, sizes
        self.tokenizer, self.reference = load_tokenizer(self.place), load(self.place)
        self.calibration = find_text(options.calibration)
        self.test = first_windows(find_text(options.test), self.tokenizer, sizes["length"], sizes["windows"])
        self.quantized = functools.lru_cache(1)(self._quantized)
        self.pass_seconds = functools.lru_cache(1)(self._pass_seconds)

    def measure(self, quantizer: str, seed: int, order: str, **_: Any) -> list[dict[str, Any]]:
        """The figures for one quantizer, seed and order. The quantized model is left as it was."""
        quantized, before = self.quantized(quantizer)
        calibration, held_out = self.batches(seed)
        float_seconds, quantized_seconds = self.pass_seconds(quantizer)
        made: list[ptq.Correction] = []
        taken = seconds(lambda: made.append(ptq.correct(quantized, self.reference, calibration, order=order)))
        (correction,) = made
        after = ptq.perplexity(quantized, self.test)
        print(f"{quantizer}, {order}, seed {seed}: {before:.3f}, with all {after:.3f}, {taken:.0f} s", flush=True)
        chosen: list[HeldOut] = []
        choosing = seconds(lambda: chosen.append(kept(correction, quantized, self.reference, held_out)))
        (choice,) = chosen
        of_choice = ptq.perplexity(quantized, self.test) if choice.dropped else after
        correction.undo()
        figures = {
            "before": before,
            "after": after,
            "chosen": of_choice,
            "modules": len(correction.modules),
            "places": sorted({module.place for module in correction.modules}),
            "loss_before": choice.before,
            "loss_chosen": choice.after,
            "passes": choice.passes,
            "kept": [shortened(group) for group in choice.kept],
            "dropped": [shortened(group) for group in choice.dropped],
            "correct_seconds": taken,
            "choice_seconds": choosing,
            "float_seconds": float_seconds,
            "quantized_seconds": quantized_seconds,
            "tool": self.tool(quantizer),
        }
        print(line({"quantizer": quantizer, "seed": seed, "order": order, **figures}), flush=True)
        return [figures]

    def batches(self, seed: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """Batches of the calibration, and those held out."""
        sizes: dict[str, Any] = {name: self.sizes[name] for name in ("length", "samples", "held_out")}
        calibration, held_out = choose_windows(self.calibration, self.tokenizer, seed=seed, **sizes)
        assert held_out is not None and len(held_out) == sizes["held_out"]
        first, second = ([{"input_ids": part} for part in ids.split(BATCH)] for ids in (calibration, held_out))
        return first, second

    def _quantized(self, quantizer: str) -> tuple[Any, float]:
        """The model that a tool makes, and its perplexity."""
        if quantizer in self.folders:
            model: Any = open_unpacked(self.folders[quantizer]).copy().eval()
        else:
            model = PEERS[quantizer].quantized(self.place)
        return model, ptq.perplexity(model, self.test)

    def _pass_seconds(self, quantizer: str) -> tuple[float, float]:
        """Of one pass of each model over the batches that it is corrected by first."""
        (calibration, _), quantized = self.batches(self.seeds[0]), self.quantized(quantizer)[0]

        def run(model: nn.Module) -> None:
            with evaluating(model):
                for batch in calibration:
                    call(model, batch)

        with evaluating(self.reference):
            call(self.reference, calibration[0])  # what is made at the first call does not count
        return seconds(lambda: run(self.reference)), seconds(lambda: run(quantized))

    def tool(self, quantizer: str) -> str:
        """What has quantized, and its version, where it is known here."""
        if quantizer in self.folders:
            return json.dumps(
                json.loads((Path(self.folders[quantizer]) / "config.json").read_text())["quantization_config"]
            )
        package = PEERS[quantizer].package
        return f"{package} {importlib.metadata.version(package)}" if package else "here"


def kept(correction: ptq.Correction, quantized: nn.Module, reference: nn.Module, held_out: list[Any]) -> HeldOut:
    """Chooses as ``correct`` does with ``held_out``, and does not calibrate once more for it."""
    placed = {module.name: each for module, each in zip(correction.modules, correction._placed, strict=True)}
    with evaluating(quantized, reference):
        return choose(
            placed,
            Judge(
                Running(quantized), Running(reference), held_out, LOSSES["kl"], None, target_of(quantized, reference)
            ),
        )


def shortened(names: list[str]) -> str:
    """A group of modules by its first and its last one."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def ratio(row: dict[str, Any]) -> float:
    """Of the time of ``correct`` to one pass of the models that it runs."""
    passes = row["float_seconds"] + (row["quantized_seconds"] if row["order"] == "sequential" else 0)
    return row["correct_seconds"] / passes


def line(row: dict[str, Any]) -> str:
    perplexities = f"{row['before']:>9.3f}{row['after']:>9.3f}{row['chosen']:>9.3f}"
    kept_groups = f"{len(row['kept'])} of {len(row['kept']) + len(row['dropped'])}"
    relative = f"{row['after'] / row['before']:>8.3f}x{row['chosen'] / row['before']:>7.3f}x"
    taken = f"{ratio(row):>8.2f}x{row['passes']:>7}"
    return f"{row['quantizer']:<34}{row['order']:<11}{row['seed']:>4}{perplexities}{relative}{kept_groups:>10}{taken}"


def show(rows: list[dict[str, Any]]) -> None:
    head = f"{'quantized by':<34}{'order':<11}{'seed':>4}{'before':>9}{'all':>9}{'chosen':>9}{'all':>9}{'chosen':>8}"
    print(f"\n{head}{'kept':>10}{'time':>9}{'passes':>7}")
    for row in rows:
        print(line(row))
    print(f"\n{'median of the seeds':<45}{'all':>8}{'chosen':>9}{'most, chosen':>14}{'time':>9}")
    for quantizer, order in dict.fromkeys((row["quantizer"], row["order"]) for row in rows):
        found = [row for row in rows if (row["quantizer"], row["order"]) == (quantizer, order)]
        after, chosen = ([row[name] / row["before"] for row in found] for name in ("after", "chosen"))
        medians = f"{statistics.median(after):>7.3f}x{statistics.median(chosen):>8.3f}x{max(chosen):>13.3f}x"
        print(f"{quantizer:<34}{order:<11}{medians}{statistics.median(map(ratio, found)):>8.2f}x")


if __name__ == "__main__":
    main()
