"""What does Bias Compensation bring to a convolutional network, and what does it take?

    python benchmarks/correct_images.py [--fashion FOLDER] [--threads 1]

A ResNet of 14 layers (0.17 million parameters) is trained on Fashion-MNIST by AdamW8bit. Its batch norms are folded
into its convolutions. The weights of all layers are then rounded to nearest, symmetrically, with one scale for each
tensor or for each channel of the output; activations stay in float32. ``ptq.correct`` corrects the result on 512
training images. Three seeds decide which. Where it chooses, it does so on 1,024 other training images.

- Test images say the accuracy, the cross-entropy, and the KL divergence from the float model's predictions.
- "stem by hand" is the paper's use: a ``BiasCompensation`` with one bias for each channel and position, behind the
  first convolution only. "stem" is ``ptq.correct`` of that convolution, with one bias for each channel.
- Times of ``ptq.correct`` are those without a choice, in turn with passes of both models over the same batches without
  gradients: medians of the processor's time, in which other work on the machine shows less. "of a float pass" is the
  ratio to one pass of the float model, "of both" that to one pass of each.

FOLDER has Fashion-MNIST's four ``*-ubyte.gz`` files, as for ``same_loss.py``. With ``--quick`` images are random.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import alternate, arguments, complete
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from training_tasks import Residual, fit, images, logits_of

import opt8bit
from opt8bit import ptq

FASHION = Path("/usr/share/datasets/fashion-mnist")
SEEDS = (0, 1, 2)
GRIDS = {  # bits, and whether each channel has a scale of its own
    "4 bits, tensor": (4, False),
    "3 bits, tensor": (3, False),
    "4 bits, channel": (4, True),
}
CHOSEN = "chosen"
BY_HAND = "stem by hand"
CORRECTIONS: dict[str, dict[str, Any]] = {  # what ptq.correct is told
    "local": {},
    "sequential": {"order": "sequential"},
    f"local, {CHOSEN}": {},
    f"sequential, {CHOSEN}": {"order": "sequential"},
    "local, median": {"statistic": "median"},
    "stem": {"layers": "stem"},
    BY_HAND: {},
}
ONE_SEED = ("local, median", "stem", BY_HAND)
TIMED = ("local", "sequential", "local, median")
WORST = 1.005  # of the uncorrected model's test loss, that a choice may end with
BOUNDS = {"local": ("of_float_pass", 1.1), "sequential": ("of_both_passes", 2.5)}


class Sizes(NamedTuple):
    """How many images, and how long."""

    epochs: int
    calibration: int
    held_out: int
    batch: int
    rounds: int


FULL = Sizes(epochs=4, calibration=512, held_out=1024, batch=128, rounds=15)
QUICK = Sizes(epochs=1, calibration=64, held_out=64, batch=32, rounds=3)


class ResNet14(nn.Module):
    """The network of He et al. for small images, with two blocks at each of three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(Residual(*each) for each in widths))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 1, 28, 28) -> (n, 10)
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


FOLDED = {ResNet14: [("stem", "norm")], Residual: [("first", "norm1"), ("second", "norm2")]}


def folded(model: nn.Module) -> nn.Module:
    """The same network with each batch norm in the convolution before it."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        for convolution, norm in FOLDED.get(type(module), ()):
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
    return model.requires_grad_(False)


def rounded(model: nn.Module, bits: int, per_channel: bool) -> Any:
    """A copy whose weights lie on the grid ``scale * code``, ``|code| <= 2 ** (bits - 1) - 1``."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rows = module.weight.flatten(1) if per_channel else module.weight.view(1, -1)
            scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.copy_(((rows / scale).round() * scale).view_as(module.weight))
    return model


def compensate_stem(quantized: Any, reference: Any, batches: list[Tensor]) -> None:
    """The paper's use, by hand: one bias for each channel and position."""
    shape = reference.stem(batches[0]).shape[1:]
    compensation = opt8bit.BiasCompensation(shape, (1, 2, 3))
    for x in batches:
        compensation.update(reference.stem(x), quantized.stem(x))
    quantized.stem = nn.Sequential(quantized.stem, compensation)


class Experiment:
    """A trained network, and what rounding and correcting it does.

    Args:
        train, test: images (n, 1, 28, 28) and classes (n,).
        sizes: of everything else.
    """

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], sizes: Sizes) -> None:
        self.train, self.test, self.sizes = train, test, sizes

    @cached_property
    def reference(self) -> nn.Module:
        """The float model, trained when it is first asked for."""
        torch.manual_seed(0)
        model, started = ResNet14(), time.process_time()
        fit(model, opt8bit.AdamW8bit(model.parameters(), lr=3e-3), *self.train, epochs=self.sizes.epochs, seed=0)
        print(f"trained in {time.process_time() - started:.0f} s of a core", flush=True)
        return folded(model)

    @cached_property
    def logits(self) -> Tensor:
        """What the float model says about the test images."""
        return logits_of(self.reference, self.test[0])

    def batches(self, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Training images to calibrate on, and others to choose on."""
        order = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(seed))
        ends = self.sizes.calibration, self.sizes.calibration + self.sizes.held_out
        parts = order[: ends[0]], order[ends[0] : ends[1]]
        calibration, held_out = (list(self.train[0][part].split(self.sizes.batch)) for part in parts)
        return calibration, held_out

    def quality(self, grid: str, correction: str, seed: int | None) -> list[dict[str, Any]]:
        """What a model says about the test images, and what was chosen."""
        model = self.reference if grid == "float32" else rounded(self.reference, *GRIDS[grid])
        found = self._corrected(model, correction, seed) if seed is not None else {}
        logits, classes = logits_of(model, self.test[0]), self.test[1]
        log_p, log_q = self.logits.log_softmax(1), logits.log_softmax(1)
        found |= {
            "accuracy": float((logits.argmax(1) == classes).double().mean() * 100),
            "cross_entropy": float(F.cross_entropy(logits.double(), classes)),
            "kl": float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).double().mean()),
        }
        which = "" if seed is None else f", seed {seed}"
        print(f"{grid}, {correction}{which}: {found['accuracy']:.2f} %, KL {found['kl']:.4f}", flush=True)
        return [found]

    def _corrected(self, model: Any, correction: str, seed: int) -> dict[str, Any]:
        """Corrects a model in place; returns what was chosen."""
        calibration, held_out = self.batches(seed)
        if correction == BY_HAND:
            compensate_stem(model, self.reference, calibration)
            return {}
        others = held_out if CHOSEN in correction else None
        result = ptq.correct(model, self.reference, calibration, held_out=others, **CORRECTIONS[correction])
        found: dict[str, Any] = {"modules": len(result.modules)}
        if result.held_out is not None:
            found["kept"] = sum(module.is_kept for module in result.modules)
            found["passes"] = result.held_out.passes
            found |= {"held_out_before": result.held_out.before, "held_out_after": result.held_out.after}
        return found

    def times(self, timed: str) -> list[dict[str, Any]]:
        """Of corrections, in turn with passes of both models over the same batches."""
        quantized, (batches, _) = rounded(self.reference, *GRIDS[timed]), self.batches(0)

        def correct(name: str) -> float:
            started = time.process_time()
            correction = ptq.correct(quantized, self.reference, batches, **CORRECTIONS[name])
            took = time.process_time() - started
            correction.undo()
            return took

        @torch.no_grad()
        def pass_over(model: nn.Module) -> float:
            started = time.process_time()
            for batch in batches:
                model(batch)
            return time.process_time() - started

        clocks: dict[str, Callable[[], float]] = {
            "float pass": partial(pass_over, self.reference),
            "quantized pass": partial(pass_over, quantized),
            **{name: partial(correct, name) for name in TIMED},
        }
        medians = {name: statistics.median(times) for name, times in alternate(clocks, self.sizes.rounds, 5).items()}
        one, both = medians["float pass"], medians["float pass"] + medians["quantized pass"]
        return [
            {"what": name, "ms": 1e3 * took, "of_float_pass": took / one, "of_both_passes": took / both}
            for name, took in medians.items()
        ]


def random_images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 1, 28, 28, generator=generator), torch.randint(10, (count,), generator=generator)


def spread(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    """The mean, and least to largest where there are several."""
    values = [row[name] for row in rows]
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show_quality(rows: list[dict[str, Any]]) -> None:
    for grid in ("float32", *GRIDS):
        heads = f"{'accuracy, %':>24}{'cross-entropy':>26}{'KL divergence':>26}"
        print(f"\n{grid:<22}{heads}" + (f"{'kept':>12}{'passes':>8}" if grid in GRIDS else ""))
        (before,) = [row for row in rows if (row["grid"], row["correction"]) == (grid, "none")]
        for correction in ("none", *CORRECTIONS):
            mine = [row for row in rows if (row["grid"], row["correction"]) == (grid, correction)]
            if mine:
                figures = f"{spread(mine, 'accuracy', 2):>24}{spread(mine, 'cross_entropy', 4):>26}"
                print(f"{correction:<22}{figures}{spread(mine, 'kl', 4):>26}{choices(mine, before)}")


def choices(rows: list[dict[str, Any]], before: dict[str, Any]) -> str:
    """How many corrections were kept, and how many passes that took; and whether a test loss is worse for it."""
    if CHOSEN not in rows[0]["correction"]:
        return ""
    ratio = max(row[name] / before[name] for row in rows for name in ("cross_entropy", "kl"))
    harm = "" if ratio <= WORST else f"  test loss {ratio:.3f}x"
    return f"{'/'.join(str(row['kept']) for row in rows):>12}{max(row['passes'] for row in rows):>8}{harm}"


def show_times(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'time of ptq.correct':<24}{'ms':>10}{'of a float pass':>18}{'of both':>10}")
    for row in rows:
        line = f"{row['what']:<24}{row['ms']:>10.1f}{row['of_float_pass']:>17.2f}x{row['of_both_passes']:>9.2f}x"
        name, bound = BOUNDS.get(row["what"], ("", 0.0))
        if name:
            line += f"  bound {bound}x: {'kept' if row[name] <= bound else 'missed'}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder with Fashion-MNIST")
    parser.add_argument("--threads", type=int, default=1, help="(default 1)")
    options = arguments(parser, "correct_images")
    torch.set_num_threads(options.threads)
    if options.quick:
        experiment, seeds = Experiment(random_images(512), random_images(128), QUICK), SEEDS[:1]
    else:
        train, test = (images(options.fashion, part) for part in ("train", "t10k"))
        experiment, seeds = Experiment(train, test, FULL), SEEDS
    wanted: list[dict[str, Any]] = [{"grid": "float32", "correction": "none", "seed": None}]
    wanted += [{"grid": grid, "correction": "none", "seed": None} for grid in GRIDS]
    wanted += [  # seed by seed, so that an early stop leaves comparable rows
        {"grid": grid, "correction": correction, "seed": seed}
        for seed, grid, correction in itertools.product(seeds, GRIDS, CORRECTIONS)
        if seed == seeds[0] or correction not in ONE_SEED
    ]
    show_quality(complete(options.rows, wanted, experiment.quality))
    show_times(complete(options.rows, [{"timed": next(iter(GRIDS))}], experiment.times))


if __name__ == "__main__":
    main()
