"""Says what ``opt8bit compress`` prints at the end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from opt8bit import ptq
from opt8bit.ptq.model.bias_places import OF_KEYS
from opt8bit.ptq.report import FOLDER, PAGE


def summary(result: ptq.Result, output: Path, seconds: float, verified: str) -> str:
    """Returns what was done, in a few lines.

    Args:
        result: of the compression.
        output: the folder that was written.
        seconds: that it took.
        verified: what is known of the written checkpoint.
    """
    rows = result.report
    worst = max(rows, key=lambda row: row.error_corrected)
    lines = [
        f"{len(rows)} layers, {result.weights:,} weights at {result.bits_per_weight:.2f} bits each, scales counted",
        f"largest error of an output, squared: {worst.error_corrected:.2%} of its own square, {worst.name}",
        *_of_symmetry(rows),
        *(_of_biases(result) if result.recipe.bias_correction != "none" else ()),
    ]
    refined = result.refined
    if refined is not None:
        lines.append(
            f"learned: the loss on windows that were not learned from is {refined.best:.4f} nats a token, "
            f"{refined.start:.4f} before ({refined.steps} steps, {refined.dropped} dropped)"
        )
    quality = result.quality
    if quality is not None:
        lines.append(
            f"perplexity on {quality.tokens:,} held-out tokens of the calibration text: "
            f"{quality.perplexity:.3f} before, {quality.perplexity_compressed:.3f} after; "
            f"KL divergence {quality.kl_divergence:.4f} nats a token"
        )
    lines.append(verified)
    lines.append(f"{output} written in {seconds:.0f} s; {FOLDER}/{PAGE} shows every layer")
    return "\n".join(lines)


def _of_symmetry(rows: list[ptq.LayerReport]) -> list[str]:
    costs = [row.symmetry_cost for row in rows if row.symmetry_cost is not None]
    if not costs:
        return []
    mean = sum(costs) / len(costs)
    change = "lower" if mean < 0 else "raise"  # few bits gain more by the sign of the scale than by a zero point
    return [f"symmetric grids, which servers ask for, {change} the error of rounding to nearest by {abs(mean):.0%}"]


def _of_biases(result: ptq.Result) -> list[str]:
    rows = result.report
    placed = [row for row in rows if row.bias_place]
    lines = [f"{len(placed)} biases, {result.bias_bytes:,} bytes more"]
    keys = [row for row in rows if row.note == OF_KEYS]
    if keys:
        lines.append(f"not corrected: {len(keys)} layers: {OF_KEYS}")
    lines += [
        f"not corrected: {row.name}: {row.note}" for row in rows if row.note and not row.bias_place and row not in keys
    ]
    skipped = Counter(row.note for row in placed if row.note)
    return [*lines, *(f"of {count} layers: {note}" for note, count in skipped.items())]
