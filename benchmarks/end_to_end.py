"""What do ``opt8bit compress``, ``verify`` and ``inspect`` take for a large checkpoint, from files to files?

    pip install ".[compress]" && python benchmarks/end_to_end.py [--samples N]

A LLaMA of 1.35 billion random weights in bfloat16 is written in files of 500 MB, and compressed by the default recipe
to 4 bits. Each command is a process of its own. Reported are its seconds, what it printed last, and the peak of its
memory without what is mapped from files, which the system may take back at any time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import arguments, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from opt8bit.ptq.export.shards import write_shards

SIZE = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
QUICK = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
WORDS = 1000  # of the text, each a token
FILE_BYTES = 500_000_000
INTERVAL = 0.05  # seconds between looks at the memory


def write_model(folder: Path, size: dict[str, int]) -> int:
    """Writes a checkpoint of random weights with a tokenizer, and returns the number of weights."""
    config = transformers.LlamaConfig(**size, architectures=["LlamaForCausalLM"], dtype="bfloat16")  # type: ignore[arg-type]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, param in model.named_parameters():
            weight = torch.randn(param.shape, generator=generator) * 0.02
            yield name, (1 + weight if param.dim() == 1 else weight).bfloat16()

    write_shards(tensors(), folder, FILE_BYTES)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return sum(param.numel() for param in model.parameters())


def write_text(file: Path, tokens: int) -> None:
    """Writes a text of random words."""
    ids = torch.randint(WORDS, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    file.write_text(" ".join(f"w{i}" for i in ids))


def anonymous_bytes(process: subprocess.Popen[Any]) -> int:
    """Returns a process's resident memory without what is mapped from files; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(found[0].split()[1]) if found else 0


def run(place: str, name: str, *words: str) -> dict[str, Any]:
    """Runs a command of opt8bit, and returns its seconds, its peak of memory and what it printed last.

    Args:
        place: folder to run in: not a clone's, whose source without kernels Python would find first.
        name: of the command.
        words: its arguments.
    """
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "opt8bit", name, *words]
        process = subprocess.Popen(command, cwd=place, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process))
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - started
        output.seek(0)
        lines = output.read().strip().splitlines()
    if process.returncode:
        raise RuntimeError("\n".join(lines[-20:]))
    return {"command": name, "seconds": round(seconds, 1), "peak_anonymous_bytes": peak, "last_lines": lines[-6:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens; and an eighth held out")
    options = arguments(parser, "end_to_end")
    size = QUICK if options.quick else SIZE
    samples, length = (4, 64) if options.quick else (options.samples, 512)
    held_out = max(samples // 8, 1)
    with tempfile.TemporaryDirectory() as place:
        model, text, out = Path(place) / "model", Path(place) / "text.txt", Path(place) / "out"
        model.mkdir()
        weights = write_model(model, size)
        write_text(text, (samples + held_out) * length)
        windows = ["--samples", f"{samples}", "--sequence-length", f"{length}", "--held-out", f"{held_out}"]
        paths = [str(model), "--calibration", str(text), "--output", str(out)]
        print(f"{weights:,} weights, {samples} windows of {length} tokens")
        commands = (("compress", *paths, *windows, "--no-verify"), ("verify", str(out)), ("inspect", str(out)))
        rows = []
        for words in commands:
            rows.append(run(place, *words))
            print(f"{words[0]:<9} {rows[-1]['seconds']:8.1f} s {rows[-1]['peak_anonymous_bytes'] / 1e9:6.2f} GB")
            print("\n".join(f"    {line}" for line in rows[-1]["last_lines"]), flush=True)
    figures = [{name: value for name, value in row.items() if name != "last_lines"} for row in rows]
    write_rows(options.rows, figures, weights=weights, samples=samples, sequence_length=length)


if __name__ == "__main__":
    main()
