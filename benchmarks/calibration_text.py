"""What does it take to get calibration windows from a large file?

    pip install ".[compress]" && python benchmarks/calibration_text.py MODEL TEXT

TEXT is repeated, its lines shuffled, until it has 100 MB, and written in several formats. Of each, the tokens that
``opt8bit compress`` asks for by default (64 windows of 512 and 8 held out) are taken with MODEL's tokenizer, without a
seed and with one, in a process of its own. Reported are the seconds, and the peak of its memory above the loaded
tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from measuring import arguments, peak_bytes, write_rows

from opt8bit.cli.models import load_tokenizer
from opt8bit.cli.texts import choose_windows, find_text

BYTES, QUICK_BYTES = 100_000_000, 3_000_000
LENGTH, SAMPLES, HELD_OUT = 512, 64, 8


def write_files(text: Path, folder: Path, size: int) -> list[Path]:
    """Writes about ``size`` bytes of text in several formats."""
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    shuffled, written = [], 0
    order = random.Random(0)
    while written < size:
        line = order.choice(lines)
        shuffled.append(line)
        written += len(line.encode()) + 1
    whole = "\n".join(shuffled)
    files = [folder / name for name in ("text.txt", "text.txt.gz", "text.jsonl")]
    files[0].write_text(whole, encoding="utf-8")
    with gzip.open(files[1], "wt", encoding="utf-8", compresslevel=1) as file:
        file.write(whole)
    files[2].write_text("\n".join(json.dumps({"text": line}) for line in shuffled), encoding="utf-8")
    return files


def taken(model: str, file: Path, seed: int) -> dict[str, Any]:
    """Returns what the windows of a file took."""
    tokenizer = load_tokenizer(model)
    tokenizer("Once, so that everything is loaded.")
    before, started = peak_bytes(), time.perf_counter()
    sizes: dict[str, Any] = {"length": LENGTH, "samples": SAMPLES, "held_out": HELD_OUT}
    windows, _ = choose_windows(find_text(str(file)), tokenizer, **sizes, seed=seed)
    seconds = time.perf_counter() - started
    return {
        "file": file.name,
        "seed": seed,
        "windows": len(windows),
        "seconds": round(seconds, 2),
        "bytes": peak_bytes() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or an id of the hub, of which the tokenizer is taken")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    options = arguments(parser, "calibration_text")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(options.text, Path(folder), QUICK_BYTES if options.quick else BYTES)
        for file in files:
            for seed in (0, 7):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    rows.append(process.submit(taken, options.model, file, seed).result())
                row = rows[-1]
                took = f"{row['seconds']:6.2f} s  {row['bytes'] / 1e6:6.0f} MB"
                print(f"{row['file']:<12} seed {seed}  {took}", flush=True)
    write_rows(options.rows, rows, file_bytes=QUICK_BYTES if options.quick else BYTES)


if __name__ == "__main__":
    main()
