"""Tensors are added to a checkpoint's files, in which nothing else changes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opt8bit.ptq.export.added import add_tensors
from opt8bit.ptq.model.tensor_files import raw_header

FP8 = torch.float8_e4m3fn
STORED = {
    "a.weight": torch.arange(24, dtype=torch.int32).view(4, 6),
    "b.weight": torch.arange(5, dtype=torch.float32).to(FP8),  # of an odd size, and of a dtype that is not written here
    "c.scale": torch.ones(2, dtype=torch.bfloat16),
}
BIAS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16)


def raw(path: Path) -> dict[str, bytes]:
    header, start = raw_header(path)
    data = path.read_bytes()[start:]
    return {name: data[slice(*about["data_offsets"])] for name, about in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("names", [("a.weight",), ("a.weight", "c.scale"), ("a.weight", "b.weight", "c.scale")])
def test_everything_else_keeps_its_bytes(names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: STORED[name] for name in names}, path, metadata={"format": "pt", "of": "somebody"})
    (tmp_path / "out").mkdir()
    add_tensors(dict.fromkeys(names, path), tmp_path / "out", {"a.bias": BIAS}, {"a.bias": "a.weight"})
    out = tmp_path / "out" / "model.safetensors"
    found = load_file(out)
    assert found.keys() == {*names, "a.bias"} and torch.equal(found["a.bias"], BIAS)
    assert {name: raw(out)[name] for name in names} == raw(path)
    for name in names:
        assert found[name].dtype == STORED[name].dtype and found[name].shape == STORED[name].shape
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "somebody"}
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    for name, about in raw_header(out)[0].items():
        assert name == "__metadata__" or about["data_offsets"][0] % found[name].element_size() == 0


def test_a_tensor_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({**STORED, "a.bias": torch.zeros(3)}, path)
    (tmp_path / "out").mkdir()
    files: dict[str, Path] = dict.fromkeys([*STORED, "a.bias"], path)
    added: dict[str, Tensor] = {"a.bias": BIAS}
    add_tensors(files, tmp_path / "out", added, {"a.bias": "a.bias"})
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a.bias"], BIAS)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == files.keys()
