"""bitsandbytes' names, arguments and defaults, and what becomes of each of them."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.integrations.bitsandbytes import optim
from opt8bit.integrations.bitsandbytes.optim import GlobalOptimManager
from opt8bit.optim.base import Optimizer8bit

CLASSES = [name for name in optim.__all__ if name != "GlobalOptimManager"]
SIGNATURES = (Path(__file__).parent / "bitsandbytes_signatures.txt").read_text().splitlines()
REQUIRED: dict[str, dict[str, Any]] = {"SGD": {"lr": 1e-2, "momentum": 0.9}, "LARS": {"lr": 1e-2, "momentum": 0.9}}


def required(name: str) -> dict[str, Any]:
    """Arguments without which bitsandbytes does not make an optimizer."""
    return REQUIRED.get(name.removesuffix("8bit").removesuffix("32bit"), {})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def stepped(name: str, **arguments: Any) -> tuple[Tensor, dict[str, Any]]:
    """Returns a parameter after a step, and its state."""
    param = parameter(64, 64)
    optimizer = getattr(optim, name)([param], **required(name), **arguments)
    param.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    return param.detach(), optimizer.state[param]


def is_8bit(state: dict[str, Any]) -> bool:
    return any(name.endswith("_codes") and value.dtype == torch.uint8 for name, value in state.items())


def test_signatures_are_those_of_bitsandbytes() -> None:
    ours = []
    for name in CLASSES:
        signature = inspect.signature(getattr(optim, name))
        kept = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
        assert kept.pop().kind == inspect.Parameter.VAR_KEYWORD  # this package's options
        ours.append(f"{name}{inspect.Signature(kept)}")
    assert sorted(ours) == sorted(SIGNATURES)


@pytest.mark.parametrize("name", CLASSES)
def test_bits_are_those_of_the_name(name: str) -> None:
    _, state = stepped(name)
    assert is_8bit(state) == name.endswith("8bit")
    kind = getattr(optim, name)
    assert issubclass(kind, Optimizer8bit) and "bitsandbytes" in str(kind)
    optimizer = kind([parameter(64, 64)], **required(name))
    assert type(pickle.loads(pickle.dumps(optimizer))) is kind
    assert repr(optimizer).startswith(f"{name} (")


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith("bit")])
def test_bits_are_those_asked_for(name: str) -> None:
    assert is_8bit(stepped(name, optim_bits=8)[1])
    assert not is_8bit(stepped(name, optim_bits=32)[1])
    for bits in (4, True, "sixteen", None):
        with pytest.raises(ValueError, match=f"{name}: optim_bits must be 8 or 32, got {bits!r}"):
            stepped(name, optim_bits=bits)


@pytest.mark.parametrize(
    ("name", "bits"), [("AdamW8bit", 4), ("AdamW32bit", 8), ("Lion8bit", 32), ("Adagrad8bit", 32), ("SGD32bit", 8)]
)
def test_bits_that_contradict_the_name_are_refused(name: str, bits: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: optim_bits must be {8 if '8bit' in name else 32} or left out"):
        stepped(name, optim_bits=bits)


@pytest.mark.parametrize(
    ("name", "asked", "bits"), [("AdamW", {}, 32), ("AdamW", {"optim_bits": "8"}, 8), ("Lion8bit", {}, 8)]
)
def test_bits_can_be_asked_for(name: str, asked: dict[str, Any], bits: int) -> None:
    assert getattr(optim, name)([parameter(64, 64)], **asked).optim_bits == bits


def test_bits_that_agree_with_the_name_are_taken() -> None:
    assert is_8bit(stepped("AdamW8bit", optim_bits=8)[1])
    assert is_8bit(stepped("AdamW8bit", optim_bits=32)[1])  # bitsandbytes' default, which it ignores
    assert is_8bit(stepped("PagedLion8bit", optim_bits=8)[1])


# What each class does, in terms of this package's own.
EQUALS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "AdamW": ({"weight_decay": 0.1, "amsgrad": True}, opt8bit.AdamW8bit, {"weight_decay": 0.1, "amsgrad": True}),
    "Adam": ({"weight_decay": 0.1}, opt8bit.AdamW8bit, {"weight_decay": 0.1}),
    "Lion": (
        {"weight_decay": 0.1, "betas": "(0.8, 0.9)"},
        opt8bit.Lion8bit,
        {"weight_decay": 0.1, "betas": (0.8, 0.9)},
    ),
    "AdEMAMix": ({"t_alpha": 10, "t_beta3": None}, opt8bit.AdEMAMix8bit, {"t_alpha": 10}),
    "SGD": ({"nesterov": True}, opt8bit.SGD8bit, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "RMSprop": ({"alpha": "0.9", "momentum": 0.5}, opt8bit.RMSprop8bit, {"alpha": 0.9, "momentum": 0.5}),
    "Adagrad": ({"initial_accumulator_value": 0.1}, opt8bit.Adagrad8bit, {"initial_accumulator_value": 0.1}),
    "LAMB": ({"max_unorm": 0.0}, opt8bit.LAMB8bit, {"adapt": False, "eps": 1e-8, "weight_decay": 0}),
    "LARS": ({"max_unorm": 0.1}, opt8bit.LARS8bit, {"lr": 1e-2, "momentum": 0.9, "trust_coefficient": 0.1}),
}


@pytest.mark.parametrize("name", EQUALS)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_step_is_that_of_this_package(name: str, bits: int) -> None:
    arguments, kind, own = EQUALS[name]
    param = parameter(64, 64)
    optimizer = kind([param], state_bits=bits, **own)
    param.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    found, state = stepped(name, optim_bits=bits, **arguments)
    assert torch.equal(found, param)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[param].items())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("AdamW8bit", {"percentile_clipping": 5}, "percentile_clipping must be 100, got 5. Instead, clip gradients"),
        ("Lion", {"block_wise": False}, "block_wise must be True, got False. Instead, optim_bits=32"),
        ("AdamW", {"args": SimpleNamespace(skip_zeros=True)}, "skip_zeros must be False, got True. Instead, freeze"),
        ("AdamW", {"args": {"max_unorm": 0.5}}, "max_unorm must be 0.0, got 0.5. Instead, take LAMB or LARS"),
        ("LAMB", {"max_unorm": 0.5}, "max_unorm must be 1.0 for the trust ratio or 0.0 for none, got 0.5"),
        ("LAMB8bit", {"amsgrad": True}, "amsgrad must be False, got True. AdamW has it"),
        ("LAMB", {"adam_w_mode": False}, "adam_w_mode must be True, got False"),
        ("LAMB", {"adam_w_mode": "False"}, "adam_w_mode must be True, got False"),
        ("LARS", {"dampening": 0.1}, "dampening must be 0, got 0.1. SGD has it"),
        ("AdamW", {"is_paged": "yes"}, "is_paged must be True or False, got 'yes'"),
    ],
)
def test_what_is_not_honoured_is_refused_with_what_to_do(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        stepped(name, **arguments)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="AdamW8bit got an unexpected keyword argument 'blocksize'"):
        stepped("AdamW8bit", blocksize=64)
    with pytest.raises(ValueError, match=r"args may have optim_bits, min_8bit_size, .*, got lr, zz"):
        stepped("AdamW8bit", args={"zz": 8, "lr": 1})
    with pytest.raises(TypeError, match="AdamW takes optim_bits for state_bits"):
        stepped("AdamW", state_bits=8)


def test_args_replaces_arguments() -> None:
    asked = SimpleNamespace(optim_bits=8, percentile_clipping=100, min_8bit_size=4096, block_wise=True, max_unorm=0.0)
    assert is_8bit(stepped("AdamW", args=asked)[1])
    assert not is_8bit(stepped("AdamW", optim_bits=8, args={"min_8bit_size": 8192})[1])
    for old in ({"block_wise": True}, {"percentile_clipping": 100}):
        assert is_8bit(stepped("AdamW8bit", **old)[1])


def test_options_of_this_package_are_taken_and_strings_are_read() -> None:
    _, state = stepped("AdamW8bit", block_size="64", min_8bit_size="1024")
    assert state["exp_avg_scale"].shape == (64, 1) and is_8bit(state)
    assert not is_8bit(stepped("AdamW8bit", min_8bit_size="8192")[1])


@pytest.mark.parametrize(
    ("name", "arguments", "option", "value"),
    [
        ("LARS", {"max_unorm": "0"}, "adapt", False),
        ("LARS", {"args": {"max_unorm": "0.5"}}, "trust_coefficient", 0.5),
        ("LARS8bit", {"dampening": "0"}, "adapt", True),
        ("LAMB", {"max_unorm": "1.0"}, "adapt", True),
        ("LAMB", {"args": SimpleNamespace(max_unorm="0.0")}, "adapt", False),
        ("LAMB8bit", {"amsgrad": "False", "adam_w_mode": "True"}, "adapt", True),
        ("AdEMAMix8bit", {"t_alpha": "None", "t_beta3": "100"}, "t_alpha", 0),
        ("AdamW", {"is_paged": "False"}, "offload", False),
        ("PagedAdam", {"is_paged": "False"}, "offload", True),
        ("SGD8bit", {"nesterov": "True"}, "nesterov", True),
        ("Adagrad8bit", {"optim_bits": "8", "initial_accumulator_value": "0.1"}, "initial_accumulator_value", 0.1),
    ],
)
def test_strings_are_read_before_anything_is_decided(
    name: str, arguments: dict[str, Any], option: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    optimizer = getattr(optim, name)([parameter(64, 64)], **required(name), **arguments)
    found = optimizer.param_groups[0][option]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_paged_states_leave_an_accelerator(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for optimizer in (optim.PagedAdamW8bit([parameter(4, 4)]), optim.AdamW([parameter(4, 4)], is_paged=True)):
        assert optimizer.param_groups[0]["offload"] is has_gpu
    assert optim.PagedLion([parameter(4, 4)], offload=False).param_groups[0]["offload"] is False
    assert optim.AdamW8bit([parameter(4, 4)]).param_groups[0]["offload"] is False


def test_overrides_hold_for_states_that_are_made_after_them() -> None:
    manager = GlobalOptimManager.get_instance()
    assert manager is GlobalOptimManager.get_instance()
    embedding, other = nn.Embedding(64, 64), parameter(64, 64)
    optimizer = optim.AdamW8bit([embedding.weight, other])
    manager.register_parameters([embedding.weight, other])
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    for param in (embedding.weight, other):
        param.grad = torch.ones(64, 64)
    optimizer.step()
    assert not is_8bit(optimizer.state[embedding.weight]) and is_8bit(optimizer.state[other])
    manager.override_config([other], "optim_bits", 32)
    optimizer.step()
    assert is_8bit(optimizer.state[other])
    manager.initialize()
    assert not hasattr(embedding.weight, "state_bits") and not hasattr(other, "state_bits")
    manager.override_config(other, key_value_dict={"optim_bits": 8})
    again = optim.AdamW([other])
    again.step()
    assert is_8bit(again.state[other])
    manager.initialize()


def test_taking_overrides_back_leaves_what_was_there_before() -> None:
    manager = GlobalOptimManager.get_instance()
    marked, bare = parameter(4, 4), parameter(4, 4)
    marked.state_bits = 32  # type: ignore[attr-defined]
    for bits in (8, "32", "8"):
        manager.override_config([marked, bare], "optim_bits", bits)
        assert marked.state_bits == bare.state_bits == int(bits)  # type: ignore[attr-defined]
    manager.initialize()
    assert marked.state_bits == 32 and not hasattr(bare, "state_bits")  # type: ignore[attr-defined]


def test_overrides_are_refused_before_anything_is_changed() -> None:
    manager, param = GlobalOptimManager.get_instance(), parameter(4, 4)
    with pytest.raises(TypeError, match="parameters must be tensors, got 'x'"):
        manager.override_config([param, "x"], "optim_bits", 8)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="give key and value, or key_value_dict, got 'optim_bits' and "):
        manager.override_config(param, "optim_bits", 8, {"optim_bits": 32})
    assert not hasattr(param, "state_bits")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optim_bits": 4}, "optim_bits must be 8 or 32, got 4"),
        ({"optim_bits": 8, "lr": 1.0}, "only optim_bits can be overridden, got lr: give those in a parameter group"),
        ({}, "optim_bits must be 8 or 32, got None"),
    ],
)
def test_other_overrides_are_refused(config: dict[str, Any], message: str) -> None:
    param = parameter(4, 4)
    with pytest.raises(ValueError, match=message):
        GlobalOptimManager.get_instance().override_config(param, key_value_dict=config)
    assert not hasattr(param, "state_bits")
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()
