"""Do two builds write the same checkpoints, byte for byte?

    python benchmarks/same_bytes.py OLD NEW [--only NAME ...]

OLD and NEW are Python interpreters that have a build each, or folders that hold its package ``opt8bit``, for the
interpreter that runs this. Both compress small random models by every method, correction, format and way of running
that there is, on one machine and one thread. What a checkpoint is loaded from is compared, not the report beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from builds import started_as

MODELS = ("llama", "opt", "gpt2")
WINDOWS = ("--samples", "16", "--sequence-length", "64", "--held-out", "2")
OVERRIDES = [
    {"layers": "*.0.*", "bits": 8, "symmetric": True},
    {"layers": "*.1.*_proj", "method": "rtn"},
    {"layers": "*.0.*_proj", "skip": True},
]
CASES: dict[str, tuple[str, ...]] = {
    "2 bits": ("--bits", "2"),
    "3 bits": ("--bits", "3"),
    "4 bits": (),
    "8 bits, asymmetric": ("--bits", "8", "--no-symmetric"),
    "rtn": ("--bits", "3", "--method", "rtn"),
    "gptq": ("--bits", "3", "--no-polish"),
    "gptq in order": ("--bits", "3", "--no-polish", "--no-act-order", "--range", "minmax"),
    "quantease": ("--bits", "3", "--method", "quantease"),
    "outliers": ("--bits", "3", "--outliers", "0.02", "--format", "dense"),
    "columns of outliers": (
        *("--bits", "3", "--outliers", "0.05", "--outlier-structure", "column", "--no-polish", "--format", "dense"),
    ),
    "local": ("--bits", "3", "--correct", "local"),
    "sequential": ("--bits", "3", "--correct", "sequential", "--error-propagation", "0"),
    "median": ("--bits", "3", "--correct", "sequential", "--statistic", "median"),
    "joint": ("--bits", "3", "--correct", "joint"),
    "whole rows": ("--group-size", "0"),
    "overrides": ("--format", "dense", "--recipe", "overrides.json"),
    "format gptq": ("--format", "gptq"),
    "format dense": ("--bits", "3", "--format", "dense"),
    "bfloat16": ("--bits", "3", "--dtype", "bfloat16"),
}
RESUMED, PROCESSES = "resumed", "two processes"
BLOCK = "block-00000.safetensors"  # in the folder of an unfinished run, when its first block is finished
WAIT = 0.005  # seconds between looks for it


def write_models(folder: Path) -> None:
    """Writes the models, a text and a recipe into a folder."""
    from tiny_models import FIRST_SPECIAL, FIRST_WORD, tiny_model, tiny_tokenizer
    from torch import Generator, randint

    for name in MODELS:
        tiny_model(name).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    ids = randint(FIRST_WORD, FIRST_SPECIAL, (4000,), generator=Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    (folder / "overrides.json").write_text(json.dumps({"overrides": OVERRIDES}))


def digests(output: Path) -> dict[str, str]:
    """Returns a hash of each file that a checkpoint is loaded from, by its name."""
    files = [file for file in sorted(output.glob("*")) if file.is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def command(model: str, output: str, options: tuple[str, ...]) -> list[str]:
    """Returns the words of a command; packed formats do not hold GPT-2's layers."""
    options = ("--format", "dense", *options) if model == "gpt2" else options
    return ["compress", model, "--calibration", "text.txt", "--output", output, *WINDOWS, "--no-verify", *options]


def work(names: list[str]) -> None:
    """Compresses by the cases of these names with the build of this process, and prints what came of each."""
    import warnings

    warnings.simplefilter("ignore")
    from opt8bit.cli.main import main

    for number, name in enumerate(names):
        for model in MODELS:
            output = f"out-{model}-{number}"
            sys.stdout = sys.stderr  # what the command prints
            status = main(command(model, output, CASES[name]))
            sys.stdout = sys.__stdout__
            found = {"refused": f"{status}"} if status else digests(Path(output))
            print(json.dumps({"case": name, "model": model, "files": found}), flush=True)


class Build:
    """One of the two.

    Args:
        place: a Python interpreter, or a folder with a package.
        folder: that the models are in.
    """

    def __init__(self, place: Path, folder: Path) -> None:
        self.folder = folder
        self.python, self.environment = started_as(place, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, *words],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def results(self, names: list[str]) -> dict[tuple[str, str], dict[str, str]]:
        """Returns hashes of files by case and model."""
        found: dict[tuple[str, str], dict[str, str]] = {}
        plain = [name for name in names if name in CASES]
        output, _ = self.start(__file__, "--work", *plain).communicate() if plain else ("", None)
        for line in output.splitlines():
            row = json.loads(line)
            found[row["case"], row["model"]] = row["files"]
        for model in MODELS:
            if RESUMED in names:
                found[RESUMED, model] = self._resumed(model)
            if PROCESSES in names:
                ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opt8bit")
                output = self.folder / f"processes-{model}"
                self.start(*ranks, *command(model, f"{output}", ("--bits", "3"))).communicate()
                found[PROCESSES, model] = digests(output)
        return found

    def _resumed(self, model: str) -> dict[str, str]:
        """Kills a run when its first block is finished, and lets another go on."""
        output = self.folder / f"resumed-{model}"
        words = ("-m", "opt8bit", *command(model, f"{output}", ("--bits", "3")))
        process = self.start(*words)
        while process.poll() is None and not list(self.folder.glob(f"*{output.name}*/**/{BLOCK}")):
            time.sleep(WAIT)
        process.kill()
        process.communicate()
        if output.exists():
            raise RuntimeError(f"{output} was finished before it could be killed: try again")
        self.start(*words, "--resume").communicate()
        return digests(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, RESUMED, PROCESSES]
    parser.add_argument("old", type=Path, metavar="OLD", help="Python interpreter, or folder with a package")
    parser.add_argument("new", type=Path, metavar="NEW", help="likewise")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="of the cases")
    options = parser.parse_args()
    found = []
    for place in (options.old, options.new):
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder))
            found.append(Build(place, Path(folder)).results(options.only))
    old, new = found
    different = 0
    for case, model in sorted(old.keys() | new.keys(), key=lambda key: (names.index(key[0]), key[1])):
        ours, theirs = new.get((case, model), {}), old.get((case, model), {})
        changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        refused = theirs.get("refused")
        same = f"both refuse ({refused})" if refused else f"the same {len(theirs)} files"
        fine = bool(theirs) and not changed
        different += not fine
        print(f"{case:<22}{model:<8}{same if fine else 'other bytes: ' + (', '.join(changed) or 'no files')}")
    print(f"{different} of {len(old.keys() | new.keys())} differ")
    sys.exit(different > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        main()
