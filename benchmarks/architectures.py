"""Which architectures of transformers can be compressed? A tiny random model of every causal one tells.

Each is built, saved, compressed to 8 bits as ``opt8bit compress`` does it, loaded plainly by transformers and compared
with the original: the tensors in its files, its configuration, its logits, and what it generates with a cache and
without. Each runs in a process of its own.

    python benchmarks/architectures.py [--only NAME ...] [--format dense] [--table FILE]
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from measuring import machine, read_rows, write_rows
from tiny_models import class_name, model_types

FORMATS = ("compressed-tensors", "dense")
RESULTS = ("whole", "refused", "wrong", "crash", "not built")
TIMEOUT = 120
PRELOADED = (  # that every process would import
    *("architecture_checks", "transformers.generation.utils", "transformers.quantizers.auto", "greenlet"),
    *("accelerate.big_modeling", "compressed_tensors.quantization", "compressed_tensors.compressors", "torch._dynamo"),
    *("torch.distributed.tensor", "torch.nn.attention.flex_attention"),
)
PROCESSES = 2


def in_process(connection: Connection, model_type: str, formats: list[str]) -> None:
    """Examines a type, away from the terminal."""
    from architecture_checks import examine

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    connection.send(examine(model_type, formats))


def measure(model_type: str, formats: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of a type, whatever becomes of its process."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=in_process, args=(theirs, model_type, formats))
    started = time.perf_counter()
    process.start()
    theirs.close()
    try:
        rows = ours.recv() if ours.poll(TIMEOUT) else [{"result": "crash", "why": f"takes more than {TIMEOUT} s"}]
    except EOFError:
        process.join()
        rows = [{"result": "crash", "why": f"the process ended with {process.exitcode}"}]
    process.join(10)  # left to end by itself, it clears away what it made
    process.kill()
    process.join()
    if len(rows) < len(formats):
        rows = [{**rows[0], "format": each} for each in formats]
    seconds = round(time.perf_counter() - started, 1)
    about = {"model_type": model_type, "class": class_name(model_type)}
    for row in rows:
        print(f"{seconds:5.1f} s  {model_type:<26}{row['format']:<20}{row['result']}: {row.get('why', '')}", flush=True)
    return [{**about, **row, "seconds": seconds} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows in Markdown: the machine, counts, and a line for each type."""
    about = rows[0] if "versions" in rows[0] else machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    formats = list(dict.fromkeys(row["format"] for row in rows))
    lines = [f"{about['processor']}, Python {about['python']}, {versions}", ""]
    lines += ["| format | " + " | ".join(RESULTS) + " |", "|---|" + "---|" * len(RESULTS)]
    for format in formats:
        counts = collections.Counter(row["result"] for row in rows if row["format"] == format)
        lines.append(f"| {format} | " + " | ".join(str(counts[result]) for result in RESULTS) + " |")
    lines += ["", f"| class | {' | '.join(formats)} | why |", "|---|" + "---|" * len(formats) + "---|"]
    for model_type in dict.fromkeys(row["model_type"] for row in rows):
        own = [row for row in rows if row["model_type"] == model_type]
        results = {row["format"]: row["result"] for row in own}
        reasons = dict.fromkeys(part for row in own for part in (row.get("why", ""), row.get("note", "")) if part)
        why = "; ".join(reasons).replace("|", "\\|")
        lines.append(f"| {own[0]['class']} | {' | '.join(results.get(format, '') for format in formats)} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="types of models, such as llama; all if not given")
    parser.add_argument("--format", choices=FORMATS, nargs="+", default=list(FORMATS), help="of the checkpoints")
    parser.add_argument("--rows", type=Path, default=Path("architectures.jsonl"), help="where rows go")
    parser.add_argument("--table", type=Path, metavar="FILE", help="where the table goes, too")
    parser.add_argument("--from-rows", action="store_true", help="only print the table of the rows that are there")
    options = parser.parse_args()
    if options.from_rows:
        rows = read_rows(options.rows)
    else:
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server knows no other
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
        with ThreadPoolExecutor(PROCESSES) as pool:
            found = pool.map(lambda name: measure(name, options.format), options.only or model_types())
            rows = [row for each in found for row in each]
        write_rows(options.rows, rows)
    text = table(rows)
    print(f"\n{text}")
    if options.table is not None:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
