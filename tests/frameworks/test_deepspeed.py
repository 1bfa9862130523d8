"""DeepSpeed's engine on the CPU. ZeRO makes one vector of each parameter group, and that is what is stepped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.integrations.bitsandbytes import install, optim, uninstall

pytestmark = pytest.mark.filterwarnings("ignore")  # what it warns of is its own
WIDTH = 1100  # so that the vector is long enough for 8 bits
INPUTS = torch.randn(4, 2, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def deepspeed() -> Iterator[Any]:
    """DeepSpeed in a training of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_RANK", "0")
        found = pytest.importorskip("deepspeed")
        found.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles this, which one process needs not
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield found
        found.comm.destroy_process_group()
        found.comm.comm.cdb = None


def config(stage: int, **offload: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **offload},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    """Two groups that differ."""
    return [{"params": list(model[0].parameters()), "weight_decay": 0.1}, {"params": list(model[2].parameters())}]


def engine_of(deepspeed: Any, settings: dict[str, Any]) -> Any:
    model = network()
    optimizer = opt8bit.AdamW8bit(groups(model), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def train(engine: Any, inputs: Tensor = INPUTS) -> None:
    for x in inputs:
        engine.backward(engine(x).square().mean())
        engine.step()


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([param.detach().flatten() for param in params])


def trained_by_hand(model: nn.Sequential, is_flat: bool) -> list[Tensor]:
    """The parameters of each group after steps of this package alone, as vectors if ZeRO has them so."""
    made = groups(model)
    stepped = [nn.Parameter(flat(group["params"])) for group in made]
    own = [{**group, "params": param} for group, param in zip(made, stepped, strict=True)] if is_flat else made
    optimizer = opt8bit.AdamW8bit(own, lr=1e-3)
    for x in INPUTS:
        model.zero_grad()
        model(x).square().mean().backward()
        for group, param in zip(made, stepped, strict=True):
            param.grad = torch.cat([each.grad.flatten() for each in group["params"]])
        optimizer.step()
        for group, param in zip(made, stepped, strict=True) if is_flat else ():
            nn.utils.vector_to_parameters(param.detach(), group["params"])
    return [flat(group["params"]) for group in made]


@pytest.mark.parametrize(("stage", "offload"), [(0, {}), (1, {}), (2, {}), (1, OFFLOAD), (2, OFFLOAD)])
def test_states_are_codes_and_steps_are_those_of_this_package(stage: int, offload: Any, deepspeed: Any) -> None:
    engine = engine_of(deepspeed, config(stage, **offload))
    train(engine)
    optimizer = engine.basic_optimizer
    assert type(optimizer) is opt8bit.AdamW8bit
    for group in optimizer.param_groups:
        state = optimizer.state[group["params"][0]]
        assert state["exp_avg_codes"].dtype == state["exp_avg_sq_codes"].dtype == torch.uint8
        assert state["exp_avg_codes"].any() and state["step"] == len(INPUTS)
        assert group["params"][0].dim() == (1 if stage else 2)
    found = [flat(group["params"]) for group in groups(engine.module)]
    expected = trained_by_hand(network(), is_flat=stage > 0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stopped_and_resumed(stage: int, deepspeed: Any, tmp_path: Path) -> None:
    whole = engine_of(deepspeed, config(stage))
    train(whole, INPUTS[:2])
    whole.save_checkpoint(str(tmp_path))
    train(whole, INPUTS[2:])
    resumed = engine_of(deepspeed, config(stage))
    resumed.load_checkpoint(str(tmp_path))
    train(resumed, INPUTS[2:])
    pairs = zip(resumed.module.parameters(), whole.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_group_keeps_its_bits(deepspeed: Any) -> None:
    model = network()
    coded, exact = groups(model)
    optimizer = opt8bit.AdamW8bit([coded, {**exact, "state_bits": 32}])
    train(deepspeed.initialize(model=model, optimizer=optimizer, config=config(1))[0], INPUTS[:1])
    first, second = (optimizer.state[group["params"][0]] for group in optimizer.param_groups)
    assert "exp_avg_codes" in first and second["exp_avg"].any()


@pytest.mark.parametrize("stage", [1, 2])
def test_through_the_trainer(stage: int, deepspeed: Any, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    tokens = torch.randint(96, (8, 12), generator=torch.Generator().manual_seed(0))
    install()
    try:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            optim="adamw_8bit",
            deepspeed={"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"},
            max_steps=2,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in tokens])
        trainer.train()
    finally:
        uninstall()
    optimizer = trainer.model_wrapped.basic_optimizer
    assert type(optimizer) is optim.AdamW
    matrices, vectors = (optimizer.state[group["params"][0]] for group in optimizer.param_groups)
    assert matrices["exp_avg_codes"].dtype == torch.uint8 and matrices["exp_avg_codes"].any()
    assert vectors["exp_avg"].dtype == torch.float32 and matrices["step"] == 2
