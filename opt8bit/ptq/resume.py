"""Keeps an unfinished run on disk: every finished block, and the hidden states that go into the next one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from opt8bit.ptq import ranks
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model import tensor_files
from opt8bit.ptq.plan import Plan
from opt8bit.ptq.result import Change
from opt8bit.quant.weight import QuantizedWeight

MANIFEST = "manifest.json"
LAYOUT = "4"  # of the folder: a run that another one began is not gone on with
WHOLE = "whole"  # the name of a changed tensor that has no parts


class Work:
    """The folder of one run. A run that was killed goes on from its last finished block, and ends with the same bytes.

    Of several processes each keeps its own hidden states, and the first one all else.

    Args:
        folder: made, if it is not there.
        identity: what the result depends on, by name: hashes of the model and the text, the options.

    Attributes:
        finished: blocks that are done, by all processes.

    Raises:
        ValueError: the folder is of a run whose identity differs; the message says in what. Or its manifest is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST
        if manifest.is_file():
            had = _read_manifest(manifest)
            changed = sorted(name for name in identity.keys() | had.keys() if identity.get(name) != had.get(name))
            if changed:
                raise ValueError(f"the unfinished run in {folder} differs in: {', '.join(changed)}")
        elif ranks.rank() == 0:
            _replace(manifest, lambda path: path.write_text(json.dumps(dict(identity), indent=2)))
        saved = {int(path.suffixes[0][1:]) for path in folder.glob(f"streams-{ranks.rank()}.*.safetensors")}
        self.finished = max(set.intersection(*ranks.gathered(saved)), default=0)

    def _streams(self, finished: int) -> Path:
        return self.folder / f"streams-{ranks.rank()}.{finished}.safetensors"

    def streams(self) -> list[Tensor]:
        """Returns what was saved with the last finished block."""
        with tensor_files.opened(self._streams(self.finished)) as file:
            return [file.get_tensor(f"{i}").clone() for i in range(len(file.keys()))]

    def save(
        self,
        block: int,
        changes: Mapping[str, Change],
        reports: Sequence[LayerReport],
        streams: Sequence[Tensor],
    ) -> None:
        """Keeps a block; whenever the process ends, it is kept whole or not at all."""
        tensors = {f"{name} {key}": part for name, change in changes.items() for key, part in _parts(change).items()}
        about = {"changes": list(changes), "reports": [asdict(report) for report in reports]}
        if ranks.rank() == 0:
            _replace(self._file(block), lambda path: tensor_files.save(tensors, path, {"block": json.dumps(about)}))
        numbered = {f"{i}": stream for i, stream in enumerate(streams)}
        _replace(self._streams(block + 1), lambda path: tensor_files.save(numbered, path))
        ranks.gathered(None)  # what all processes had in common goes when they have the next one
        for path in self.folder.glob(f"streams-{ranks.rank()}.*.safetensors"):
            if path != self._streams(block + 1):
                path.unlink()
        self.finished = block + 1

    def kept(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Returns this process's tensors of a name; they are made, and kept whole or not at all, if there are none."""
        path = self.folder / f"{name}-{ranks.rank()}.safetensors"
        if not path.is_file():
            made = make()
            _replace(path, lambda partial: tensor_files.save(made, partial))
            return made
        with tensor_files.opened(path) as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}

    def reports(self) -> list[LayerReport]:
        """Returns the reports on the layers of all finished blocks."""
        rows = [row for block in range(self.finished) for row in self._about(block)["reports"]]
        return [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in rows]

    def changes(self, plan: Plan, outside: Mapping[str, Change]) -> Mapping[str, Change]:
        """Returns what has changed: in all finished blocks, read when it is asked for, and outside of them."""
        files = {name: self._file(i) for i in range(self.finished) for name in self._about(i)["changes"]}
        return _SavedChanges(files, plan, outside)

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05}.safetensors"

    def _about(self, block: int) -> dict[str, Any]:
        with tensor_files.opened(self._file(block)) as opened:
            return _about(opened)


def _read_manifest(manifest: Path) -> dict[str, str]:
    """
    Raises:
        ValueError: the file is damaged.
    """
    try:
        had = json.loads(manifest.read_text())
    except ValueError as error:
        raise ValueError(f"{manifest} is damaged: {error}") from error
    if not isinstance(had, dict):
        raise ValueError(f"{manifest} is damaged: expected an object, got {had!r}")
    return had


class _SavedChanges(Mapping[str, Change]):
    def __init__(self, files: Mapping[str, Path], plan: Plan, outside: Mapping[str, Change]) -> None:
        self._files = files
        self._plan = plan
        self._outside = outside

    def __getitem__(self, name: str) -> Change:
        if name in self._outside:
            return self._outside[name]
        with tensor_files.opened(self._files[name]) as opened:
            keys = [key for key in opened.keys() if key.rpartition(" ")[0] == name]
            parts = {key.rpartition(" ")[2]: opened.get_tensor(key).clone() for key in keys}
        if parts.keys() == {WHOLE}:
            return parts[WHOLE]
        plan = self._plan.of(name.rpartition(".")[0])
        assert plan is not None
        return QuantizedWeight.from_tensors(parts, plan.method.grids(plan.scheme))

    def __iter__(self) -> Iterator[str]:
        return iter((*self._outside, *self._files))

    def __len__(self) -> int:
        return len(self._outside) + len(self._files)


def _parts(change: Change) -> dict[str, Tensor]:
    return change.tensors() if isinstance(change, QuantizedWeight) else {WHOLE: change}


def _about(opened: Any) -> dict[str, Any]:
    """Returns what a block's open file says of its layers."""
    return json.loads(opened.metadata()["block"])


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    write(partial)
    os.replace(partial, path)
