"""Distributed checkpoints in another layout than they are loaded into: refused, and converted."""

from __future__ import annotations

import copy
import importlib
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

import training
from processes import run
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict

import opt8bit
from opt8bit.backends import COMPENSATION, stored_as
from opt8bit.optim import check_distributed_checkpoint, convert_distributed_checkpoint, distributed_files
from opt8bit.optim.distributed_layout import signs
from opt8bit.quant import block_view, decode_state, dequantize_blockwise, dynamic_map, encode_state

dcp: Any = importlib.import_module("torch.distributed.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's word on one process alone

CODED = ("square", "uneven", "few", "image")  # of training.SHAPES, by default
STATES = {"exp_avg": True, "exp_avg_sq": False}  # of AdamW: whether each is signed
CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {  # (what is saved, what is changed for loading, what is said)
    "8 bits into 32": ("AdamW", {"state_bits": 32}, "in 8-bit codes, .*exp_avg is wanted in 32 bits"),
    "32 bits into 8": ("AdamW, 32 bits", {"state_bits": 8}, "in 32 bits, .*exp_avg_codes is wanted in 8-bit codes"),
    "a larger min_8bit_size": ("AdamW", {"min_8bit_size": 10**6}, "in 8-bit codes, .*exp_avg is wanted in 32 bits"),
    "a smaller min_8bit_size": ("AdamW", {"min_8bit_size": 16}, r"small\.exp_avg in 32 bits, .*wanted in 8-bit codes"),
    "smaller blocks": ("AdamW", {"block_size": 64}, r"in blocks of another size .* has shape \(64, 1\) .* \(64, 4\)"),
    "larger blocks": ("SGD", {"block_size": 256}, r"in blocks of another size .* has shape \(64, 4\) .* \(64, 1\)"),
}


def parts_of(case: str, **changes: Any) -> dict[str, Any]:
    """A model that has taken no step and its optimizer, as they are loaded."""
    return parts_and_optimizer(case, **changes)[0]


def parts_and_optimizer(case: str, **changes: Any) -> tuple[dict[str, Any], Any, Any]:
    model, optimizer = training.made(case)
    optimizer.param_groups[0].update(changes)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), model, optimizer


def flat(parts: Any) -> dict[str, Any]:
    return dict(dcp._nested_dict.flatten_state_dict(parts)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Returns the checkpoint of a case after three steps, and what it holds."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(case: str) -> tuple[Path, dict[str, Any]]:
        if case not in made:
            folder = tmp_path_factory.mktemp("saved") / "checkpoint"
            model, optimizer = training.made(case)
            for number in range(3):
                training.step(model, optimizer, number)
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save({**parts, "epoch": 7, "rng": torch.arange(5)}, checkpoint_id=folder)
            made[case] = folder, copy.deepcopy(flat(parts))
        return made[case]

    return of


def loaded(parts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a checkpoint makes of them."""
    check_distributed_checkpoint(parts, folder)
    dcp.load(parts, checkpoint_id=folder)
    return flat(parts)


def values(found: dict[str, Any], state: str, block_size: int) -> Tensor:
    """A state in full, however it is stored."""
    codes, scale = stored_as(state)
    if state in found:
        return found[state]
    return decode_state(found[codes], found[scale], signs()[state.rpartition(".")[2]], block_size)


@pytest.mark.parametrize("change", CHANGES)
def test_another_layout_is_refused_and_nothing_changes(change: str, saved: Any) -> None:
    case, changes, message = CHANGES[change]
    folder, _ = saved(case)
    parts = parts_of(case, **changes)
    before = copy.deepcopy(flat(parts))
    way_out = r"opt8bit\.optim\.convert_distributed_checkpoint\(state_dict, folder, new_folder\)"
    with pytest.raises(ValueError, match=f"has optimizer.state.{'.*'}{message}.*{way_out}") as caught:
        check_distributed_checkpoint(parts, folder)
    names_torchs = "opt8bit.optim.to_torch_state_dict(optimizer)" in str(caught.value)
    assert names_torchs == ("wanted in 32 bits" in message)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict|Size mismatch"):
        dcp.load(parts, checkpoint_id=folder)
    for name, value in flat(parts).items():
        assert torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]


@pytest.mark.parametrize("change", CHANGES)
def test_a_converted_checkpoint_is_loaded(change: str, saved: Any, tmp_path: Path) -> None:
    case, changes, _ = CHANGES[change]
    folder, was = saved(case)
    parts = parts_of(case, **changes)
    before = copy.deepcopy(flat(parts))
    convert_distributed_checkpoint(parts, folder, tmp_path / "new")
    assert all(
        torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
        for name, value in flat(parts).items()
    )
    found = loaded(parts, tmp_path / "new")
    block_size, old_block_size = (
        found["optimizer.param_groups.0.block_size"],
        training.CASES[case][2].get("block_size", 256),
    )
    assert block_size == changes.get("block_size", old_block_size)
    assert all(found[f"optimizer.param_groups.0.{name}"] == value for name, value in changes.items())
    of_states = {name for name in found if ".state." in name and name.rpartition(".")[2] != "step"}
    for name in found.keys() - of_states:
        if isinstance(found[name], Tensor):
            assert torch.equal(found[name], was[name])
    states = {"exp_avg": True, "exp_avg_sq": False} if "AdamW" in case else {"momentum_buffer": True}
    for param, shape in training.SHAPES.items():
        for name, signed in states.items():
            state = f"optimizer.state.{param}.{name}"
            codes, scale = stored_as(state)
            exact = values(was, state, old_block_size)
            if state in found:
                assert found[state].dtype == torch.float32 and torch.equal(found[state], exact)
            elif block_size == old_block_size and codes in was:
                assert torch.equal(found[codes], was[codes]) and torch.equal(found[scale], was[scale])
            else:
                expected = encode_state(exact, signed, block_size)
                assert torch.equal(found[codes], expected[0]) and torch.equal(found[scale], expected[1])
                assert found[scale].shape == block_view(shape, block_size).absmax_shape


def test_8_bits_to_32_and_back_gives_the_same_bits(saved: Any, tmp_path: Path) -> None:
    folder, was = saved("AdamW")
    convert_distributed_checkpoint(parts_of("AdamW", state_bits=32), folder, tmp_path / "32")
    convert_distributed_checkpoint(parts_of("AdamW"), tmp_path / "32", tmp_path / "8")
    found = loaded(parts_of("AdamW"), tmp_path / "8")
    assert found.keys() == was.keys() and "optimizer.state.square.exp_avg_codes" in found
    assert all(torch.equal(value, was[name]) for name, value in found.items() if isinstance(value, Tensor))


def test_training_goes_on_as_load_state_dict_lets_it(saved: Any, tmp_path: Path) -> None:
    """The converter changes states as the optimizer does that loads a state dict of another layout."""
    folder, _ = saved("AdamW")
    changes = {"block_size": 64, "min_8bit_size": 16}
    results = []
    for way in ("converted", "plain"):
        parts, model, optimizer = parts_and_optimizer("AdamW", **(changes if way == "converted" else {}))
        source = folder
        if way == "converted":
            source = tmp_path / way
            convert_distributed_checkpoint(parts, folder, source)
        loaded(parts, source)
        optimizer.param_groups[0].update(changes)
        model.load_state_dict(parts["model"])
        training.set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        training.step(model, optimizer, 3)
        results.append(training.everything(model, optimizer))
    assert results[0].keys() == results[1].keys() and "small.exp_avg_codes" in results[0]
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_a_checkpoint_in_the_layout_that_is_wanted_is_copied(saved: Any, tmp_path: Path) -> None:
    folder, was = saved("AdamW, compensation")
    convert_distributed_checkpoint(parts_of("AdamW, compensation"), folder, tmp_path / "new")
    extra = {"epoch": 0, "rng": torch.zeros(5, dtype=torch.int64)}
    found = loaded({**parts_of("AdamW, compensation"), **extra}, tmp_path / "new")
    assert found["epoch"] == 7 and torch.equal(found["rng"], torch.arange(5))
    assert f"optimizer.state.square.{COMPENSATION}" in was
    assert all(torch.equal(found[name], value) for name, value in was.items() if isinstance(value, Tensor))


def test_hyper_parameters_are_kept_and_options_are_the_new_ones(saved: Any, tmp_path: Path) -> None:
    folder, was = saved("AdamW")
    parts = parts_of("AdamW", state_bits=32, lr=5.0, seed=9)
    parts["optimizer"]["param_groups"][0]["added"] = "by a scheduler"
    convert_distributed_checkpoint(parts, folder, tmp_path / "new")
    found = loaded(parts, tmp_path / "new")
    group = "optimizer.param_groups.0."
    assert found[f"{group}lr"] == was[f"{group}lr"] == 1e-2
    assert (found[f"{group}state_bits"], found[f"{group}seed"], found[f"{group}added"]) == (32, 9, "by a scheduler")


def test_a_missing_compensation_is_zero(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("AdamW, bfloat16")
    convert_distributed_checkpoint(parts_of("AdamW, compensation"), folder, tmp_path / "new")
    found = loaded(parts_of("AdamW, compensation"), tmp_path / "new")
    assert not found[f"optimizer.state.square.{COMPENSATION}"].any()
    assert found["optimizer.state.square.exp_avg_codes"].any()


def old_states(block_size: int, bits: int = 8) -> dict[str, dict[str, Tensor]]:
    """States as AdamW8bit stored them in the old layout."""
    generator = torch.Generator().manual_seed(0)
    states: dict[str, dict[str, Tensor]] = {}
    for param, shape in training.SHAPES.items():
        states[param] = {"step": torch.tensor(3.0)}
        for name in STATES:
            if param in CODED and bits == 8:
                states[param][name] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
                blocks = block_view(shape, block_size).absmax_shape
                states[param][f"{name}_absmax"] = torch.rand(blocks, generator=generator) + 1e-3
            else:
                states[param][name] = torch.rand(shape, generator=generator)
    return states


def old_checkpoint(folder: Path, block_size: int = 256) -> dict[str, dict[str, Tensor]]:
    """A checkpoint of the old layout; some options that there are now it lacks."""
    parts = parts_of("AdamW", block_size=block_size)
    parts["optimizer"]["state"] = states = old_states(block_size)
    for name in ("state_bits", "compensation", "capturable", "seed"):
        del parts["optimizer"]["param_groups"][0][name]
    dcp.save(parts, checkpoint_id=folder)
    return states


def test_the_old_layout_is_refused(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "old")
    message = "square.exp_avg in 8-bit codes of the old layout, .* is wanted {}: .*convert_distributed_checkpoint"
    with pytest.raises(ValueError, match=message.format("in 8-bit codes")):
        check_distributed_checkpoint(parts_of("AdamW"), tmp_path / "old")
    with pytest.raises(ValueError, match=message.format("in 32 bits")):
        check_distributed_checkpoint(parts_of("AdamW", state_bits=32), tmp_path / "old")


@pytest.mark.parametrize("block_size", [256, 64])
def test_bytes_of_the_old_layout_are_counted_from_zero(block_size: int, tmp_path: Path) -> None:
    states = old_checkpoint(tmp_path / "old", block_size)
    parts = parts_of("AdamW", block_size=block_size)
    convert_distributed_checkpoint(parts, tmp_path / "old", tmp_path / "new")
    found = loaded(parts, tmp_path / "new")
    for param in training.SHAPES:
        for name, signed in STATES.items():
            codes, scale = stored_as(f"optimizer.state.{param}.{name}")
            was = states[param][name]
            if param in CODED:
                assert torch.equal(found[codes], was - (127 if signed else 0))
                assert torch.equal(found[scale], states[param][f"{name}_absmax"])
            else:
                assert torch.equal(found[f"optimizer.state.{param}.{name}"], was)
    with pytest.raises(CheckpointException, match="Missing key"):  # it is left behind
        dcp.load(
            {"optimizer": {"state": {"square": {"exp_avg_absmax": torch.zeros(64, 1)}}}}, checkpoint_id=tmp_path / "new"
        )


@pytest.mark.parametrize("changes", [{"state_bits": 32}, {"block_size": 64}])
def test_the_old_layout_in_another(changes: dict[str, Any], tmp_path: Path) -> None:
    states = old_checkpoint(tmp_path / "old")
    parts = parts_of("AdamW", **changes)
    convert_distributed_checkpoint(parts, tmp_path / "old", tmp_path / "new")
    found = loaded(parts, tmp_path / "new")
    for name, signed in STATES.items():
        was = states["uneven"]
        exact = dequantize_blockwise(was[name], was[f"{name}_absmax"], dynamic_map(signed), 256)
        state = f"optimizer.state.uneven.{name}"
        if "state_bits" in changes:
            assert torch.equal(found[state], exact)
        else:
            codes, scale = encode_state(exact, signed, 64)
            assert torch.equal(found[stored_as(state)[0]], codes) and torch.equal(found[stored_as(state)[1]], scale)


def test_states_of_torch_and_for_torch(saved: Any, tmp_path: Path) -> None:
    folder, was = saved("AdamW")

    def theirs() -> Any:
        model, _ = training.made("AdamW")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    with pytest.raises(ValueError, match=r"to_torch_state_dict\(optimizer\)"):
        check_distributed_checkpoint(theirs(), folder)
    parts = theirs()
    convert_distributed_checkpoint(parts, folder, tmp_path / "torch")
    found = loaded(parts, tmp_path / "torch")
    assert torch.equal(found["optimizer.state.square.exp_avg"], values(was, "optimizer.state.square.exp_avg", 256))
    ours = parts_of("AdamW")
    convert_distributed_checkpoint(ours, tmp_path / "torch", tmp_path / "ours")
    found = loaded(ours, tmp_path / "ours")
    assert all(torch.equal(found[name], value) for name, value in was.items() if isinstance(value, Tensor))


@pytest.mark.parametrize("kind", ["numbers", "flattened", "alone"])
def test_names_in_other_forms(kind: str, tmp_path: Path) -> None:
    def parts_of(block_size: int, steps: int) -> dict[str, Any]:
        model, optimizer = training.made("AdamW")
        optimizer.param_groups[0]["block_size"] = block_size
        for number in range(steps):
            training.step(model, optimizer, number)
        if kind == "flattened":
            get_state_dict(model, optimizer)
            model.zero_grad()
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            return {"optim": get_optimizer_state_dict(model, optimizer, options=options)}
        return optimizer.state_dict() if kind == "alone" else {"state": {"optim": optimizer.state_dict()}}

    source = parts_of(256, 3)
    dcp.save(source, checkpoint_id=tmp_path / "old")
    parts = parts_of(300, 1)  # rows of 256 elements have as many blocks: only options tell
    convert_distributed_checkpoint(parts, tmp_path / "old", tmp_path / "new")
    was, found = flat(source), loaded(parts, tmp_path / "new")
    states = [name.removesuffix("_codes") for name in was if name.endswith("exp_avg_codes")]
    assert len(states) == len(CODED)
    for state in states:
        codes, scale = encode_state(values(was, state, 256), True, 300)
        assert torch.equal(found[stored_as(state)[0]], codes) and torch.equal(found[stored_as(state)[1]], scale)


def test_states_without_parameter_groups_go_by_their_shapes(tmp_path: Path) -> None:
    values = torch.randn(4, 96)
    names = stored_as("exp_avg")
    old = {"state": {"w": dict(zip(names, encode_state(values, True, 32), strict=True))}}
    new = {"state": {"w": dict(zip(names, encode_state(torch.zeros(4, 96), True, 96), strict=True))}}
    dcp.save(old, checkpoint_id=tmp_path / "old")
    with pytest.raises(ValueError, match=r"has no block_size of state.w.exp_avg: rows of 96 elements lie in 3 blocks"):
        convert_distributed_checkpoint(new, tmp_path / "old", tmp_path / "new")
    old["state"]["w"] = dict(zip(names, encode_state(values[:, :3], True, 1), strict=True))
    new["state"]["w"] = dict(zip(names, encode_state(values[:, :3], True, 3), strict=True))
    expected = copy.deepcopy(new)
    dcp.save(old, checkpoint_id=tmp_path / "ones")
    convert_distributed_checkpoint(new, tmp_path / "ones", tmp_path / "new")
    for name in names:
        new["state"]["w"][name].zero_()
    loaded(new, tmp_path / "new")
    decoded = decode_state(old["state"]["w"][names[0]], old["state"]["w"][names[1]], True, 1)
    assert torch.equal(decoded, values[:, :3])
    assert all(torch.equal(new["state"]["w"][name], expected["state"]["w"][name]) for name in names)


def test_what_is_wanted_is_checked_for_both_its_parts(saved: Any, tmp_path: Path) -> None:
    parts = parts_of("AdamW")
    del parts["optimizer"]["state"]["square"]["exp_avg_scale"]
    with pytest.raises(ValueError, match=r"state_dict has no optimizer.state.square.exp_avg_scale"):
        convert_distributed_checkpoint(parts, saved("AdamW")[0], tmp_path / "new")


def test_folders_that_cannot_be_read_or_written(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("AdamW")
    parts = parts_of("AdamW", state_bits=32)
    with pytest.raises(ValueError, match=r"missing is no checkpoint, or one whose saving did not end"):
        convert_distributed_checkpoint(parts, tmp_path / "missing", tmp_path / "new")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").touch()
    for target in (full, full / "notes", folder):
        with pytest.raises(ValueError, match=f"new_folder must be missing or empty, got {target}"):
            convert_distributed_checkpoint(parts, folder, target)
    assert [each.name for each in full.iterdir()] == ["notes"] and not (tmp_path / "new").exists()


def damaged(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    """Saves a checkpoint whose states have been changed."""
    model, optimizer = training.made("AdamW")
    training.step(model, optimizer, 0)
    parts: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    change(parts["optimizer"]["state"]["square"])
    dcp.save(parts, checkpoint_id=folder)


def replaced(name: str, index: int | None, value: Any) -> Callable[[dict[str, Any]], object]:
    """Replaces a tensor, or one of its numbers."""

    def change(state: dict[str, Any]) -> None:
        if index is None:
            state[name] = value
        else:
            state[name] = state[name].clone()
            state[name].view(-1)[index] = value

    return change


def old(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """In the old layout."""

    def renamed(state: dict[str, Any]) -> None:
        state["exp_avg"], state["exp_avg_absmax"] = state.pop("exp_avg_codes"), state.pop("exp_avg_scale").abs()
        change(state)

    return renamed


FULL = {"exp_avg": torch.ones(64, 256), "exp_avg_sq": torch.ones(64, 256)}


def in_full(**tensors: Tensor) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        state.clear()
        state |= {"step": torch.tensor(1.0), **FULL, **tensors}

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "codes without scales": (lambda state: state.pop("exp_avg_scale"), "has no .*square.exp_avg_scale"),
    "scales without codes": (lambda state: state.pop("exp_avg_codes"), "has no .*square.exp_avg_codes"),
    "nothing": (lambda state: (state.pop("exp_avg_scale"), state.pop("exp_avg_codes")), "has no .*square.exp_avg"),
    "NaN": (replaced("exp_avg_scale", 5, torch.nan), "square.exp_avg_scale' must be finite"),
    "infinity": (replaced("exp_avg_sq_scale", 5, torch.inf), "square.exp_avg_sq_scale' must be finite"),
    "negative": (replaced("exp_avg_sq_scale", 5, -1.0), "square.exp_avg_sq_scale' must be finite and not negative"),
    "shape": (
        replaced("exp_avg_codes", None, torch.zeros(64, 255, dtype=torch.uint8)),
        r"square.exp_avg_codes must have",
    ),
    "blocks": (replaced("exp_avg_scale", None, torch.ones(64, 3)), r"square.exp_avg_scale must have shape \(64, 1\)"),
    "dtype": (
        replaced("exp_avg_codes", None, torch.full((64, 256), 0.5)),
        "square.exp_avg_codes' must hold whole numbers",
    ),
    "no step": (lambda state: state.pop("step"), "has no optimizer.state.square.step"),
    "old, negative": (
        old(replaced("exp_avg_absmax", 5, -1.0)),
        "square.exp_avg_absmax' must be finite and not negative",
    ),
    "old, NaN": (old(replaced("exp_avg_absmax", 5, torch.nan)), "square.exp_avg_absmax' must be finite"),
    "old, codes without scales": (
        old(lambda state: state.pop("exp_avg_absmax")),
        "exp_avg must be of real .* no scales",
    ),
    "old, scales without codes": (old(lambda state: state.pop("exp_avg")), "has no .*square.exp_avg:"),
    "no number": (replaced("exp_avg_codes", None, "codes"), "square.exp_avg must be a tensor"),
    "in full, negative": (in_full(exp_avg_sq=-torch.ones(64, 256)), "square.exp_avg_sq' must not be negative"),
    "in full, shape": (in_full(exp_avg=torch.ones(64, 255)), "square.exp_avg must have shape"),
}


@pytest.mark.parametrize("changes", [{"block_size": 64}, {"state_bits": 32}, {}], ids=["64", "32 bits", "as it is"])
@pytest.mark.parametrize("flaw", BAD)
def test_bad_states_are_refused_by_name_and_nothing_is_written(
    flaw: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    change, message = BAD[flaw]
    damaged(change, tmp_path / "old")
    parts = parts_of("AdamW", **changes)
    (tmp_path / "empty").mkdir()
    for target in ("missing", "empty"):
        with pytest.raises(ValueError, match=message):
            convert_distributed_checkpoint(parts, tmp_path / "old", tmp_path / target)
    assert not (tmp_path / "missing").exists() and not any((tmp_path / "empty").iterdir())


def test_a_number_that_has_no_code_is_refused(tmp_path: Path) -> None:
    damaged(in_full(exp_avg=torch.full((64, 256), torch.nan)), tmp_path / "old")
    with pytest.raises(ValueError, match=r"square.exp_avg.* must be finite to be stored in 8 bits"):
        convert_distributed_checkpoint(parts_of("AdamW"), tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    parts = parts_of("AdamW", state_bits=32)
    convert_distributed_checkpoint(parts, tmp_path / "old", tmp_path / "new")
    assert loaded(parts, tmp_path / "new")["optimizer.state.square.exp_avg"].isnan().all()


def test_damaged_files_are_refused(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("AdamW")
    parts = parts_of("AdamW", state_bits=32)
    shutil.copytree(folder, tmp_path / "old")
    (file,) = (tmp_path / "old").glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="is truncated: it lacks a part of"):
        convert_distributed_checkpoint(parts, tmp_path / "old", tmp_path / "new")
    with (tmp_path / "old" / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    place = next(
        at for index, at in metadata.storage_data.items() if index.fqn == "optimizer.state.square.exp_avg_codes"
    )
    file.write_bytes(data[: place.offset] + bytes(place.length) + data[place.offset + place.length :])
    with pytest.raises(ValueError, match=r"optimizer.state.square.exp_avg_codes cannot be read from"):
        convert_distributed_checkpoint(parts, tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_one_tensor_is_in_memory_at_a_time(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    read = distributed_files.Source.tensor

    def counted(self: Any, name: str) -> Tensor:
        tensor = read(self, name)
        alive[:] = [each for each in alive if each() is not None] + [weakref.ref(tensor)]
        assert len(alive) <= 3, name  # codes and scales that are being converted, and what was written last
        return tensor

    monkeypatch.setattr(distributed_files.Source, "tensor", counted)
    convert_distributed_checkpoint(parts_of("AdamW", state_bits=32), saved("AdamW")[0], tmp_path / "new")
    assert alive


def test_every_state_of_the_package_has_a_sign() -> None:
    kinds = [getattr(opt8bit.optim, name) for name in opt8bit.optim.__all__]
    kinds = [kind for kind in kinds if isinstance(kind, type)]
    expected = {"exp_avg": True, "exp_avg_slow": True, "momentum_buffer": True, "grad_avg": True}
    expected |= dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance", "sum"), False)
    assert expected.items() <= signs().items()  # others' optimizers may have more
    for kind in kinds:
        optimizer = kind([("weight", torch.zeros(1, 1))])
        rule = optimizer.rule(optimizer.param_groups[0])
        assert rule.states.items() <= signs().items()


@pytest.mark.slow
def test_columns_go_from_2_processes_to_4_and_back(tmp_path: Path) -> None:
    run("columns.py", 2, tmp_path, "none", "on-2")
    run("columns.py", 4, tmp_path, "on-2", "on-4")
    run("columns.py", 2, tmp_path, "on-4", "again-on-2")
    on_2, on_4, again = (torch.load(tmp_path / f"{name}.pt") for name in ("on-2", "on-4", "again-on-2"))
    assert "exp_avg_codes" in on_2 and on_4["exp_avg"].dtype == torch.float32
    for name, signed in STATES.items():
        codes, scale = stored_as(name)
        assert torch.equal(on_4[name], decode_state(on_2[codes], on_2[scale], signed, 256)) and on_4[name].any()
        assert torch.equal(again[codes], on_2[codes]) and torch.equal(again[scale], on_2[scale])
    assert torch.equal(on_4["param"], on_2["param"]) and torch.equal(again["param"], on_2["param"])
