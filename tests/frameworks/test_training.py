"""Other people's training loops, with their real packages: trained, stopped and resumed to the same bits."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opt8bit

pytestmark = pytest.mark.filterwarnings("ignore")  # what they warn of is theirs
STEPS, STOPPED_AT = 6, 3


def everything(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """The parameters and their states."""
    states = [value for param in model.parameters() for value in optimizer.state[param].values()]
    return [*(param.detach().clone() for param in model.parameters()), *(value.clone() for value in states)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(tensor.dtype == torch.uint8 for tensor in found)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 512), nn.Dropout(0.1), nn.ReLU(), nn.Linear(512, 16))


def test_transformers(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.randint(96, (24, 12), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": each, "labels": each} for each in ids]

    def run(folder: Path, resume: bool, steps: int = STEPS) -> list[Tensor]:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            save_strategy="steps",
            save_steps=STOPPED_AT,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        torch.manual_seed(0)
        trainer = transformers.Trainer(
            transformers.LlamaForCausalLM(config),
            arguments,
            train_dataset=samples,
            optimizer_cls_and_kwargs=(opt8bit.AdamW8bit, {"lr": 1e-2}),
        )
        trainer.train(resume_from_checkpoint=resume)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert isinstance(optimizer, opt8bit.AdamW8bit)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}  # none for norms and biases
        return everything(trainer.model, optimizer)

    expected = run(tmp_path / "whole", False)
    run(tmp_path / "stopped", False, STOPPED_AT)
    assert_same(run(tmp_path / "stopped", True), expected)


def test_accelerate(tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate")

    def begun() -> tuple[Any, nn.Module, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def train(accelerator: Any, model: nn.Module, optimizer: Any, steps: range) -> None:
        for number in steps:
            optimizer.zero_grad()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
            accelerator.backward(model(x).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    accelerator, model, optimizer = begun()
    train(accelerator, model, optimizer, range(STOPPED_AT))
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, range(STOPPED_AT, STEPS))
    expected = everything(model, optimizer.optimizer)

    accelerator, model, optimizer = begun()
    accelerator.load_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, range(STOPPED_AT, STEPS))
    assert_same(everything(model, optimizer.optimizer), expected)


@pytest.mark.parametrize("kind", [opt8bit.AdamW8bit, torch.optim.AdamW])
def test_accelerate_tells_of_a_step_that_its_scaler_skips(kind: Any) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # which it makes for GPUs only
    model = network()
    model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=1e-2))
    for has_infinity in (False, True, False):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(8, 16)).square().mean())
        if has_infinity:
            model[0].weight.grad[0, 0] = torch.inf
        before = everything(model, optimizer.optimizer)
        optimizer.step()
        after = everything(model, optimizer.optimizer)
        assert optimizer.step_was_skipped == has_infinity
        is_same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert is_same == has_infinity


BATCHES = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))


def lightning_module(lightning: Any, **options: Any) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = network()
            self.net[1].p = 0.0  # whose random numbers a checkpoint has no place for

        def training_step(self, batch: Any) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = opt8bit.AdamW8bit(self.parameters(), lr=1e-2, **options)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Module()


def lightning_run(
    lightning: Any, module: Any, epochs: int, clip: float, checkpoint: Path | None = None, **options: Any
) -> tuple[Any, list[Tensor]]:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(BATCHES.flatten(0, 1)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer, everything(module, trainer.optimizers[0])


def test_lightning(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")

    def run(epochs: int, checkpoint: Path | None = None) -> tuple[Any, list[Tensor]]:
        return lightning_run(lightning, lightning_module(lightning), epochs, 1.0, checkpoint)

    _, expected = run(2)
    trainer, _ = run(1)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    assert_same(run(2, tmp_path / "stopped.ckpt")[1], expected)


def test_lightning_clips_scaled_gradients() -> None:
    """As this loop does. With ``fused=True`` the step unscales, too late for clipping: Lightning refuses it."""
    lightning: Any = pytest.importorskip("lightning")
    plugins = importlib.import_module("lightning.pytorch.plugins")

    clip, scale = 0.01, 8.0  # a scale that no gradient overflows float16 with
    module = lightning_module(lightning)
    (optimizer,), _ = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for batch in BATCHES:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = module.training_step([batch])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(module.parameters(), clip) > clip
        scaler.step(optimizer)
        scaler.update()
    expected = everything(module, optimizer)

    def run(**options: Any) -> list[Tensor]:
        # Its own precision="16-mixed" becomes bfloat16 on the CPU, without a scaler.
        precision = plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        return lightning_run(lightning, lightning_module(lightning, **options), 1, clip, plugins=precision)[1]

    assert_same(run(), expected)
    with pytest.raises(RuntimeError, match="AdamW8bit, does not allow for gradient clipping"):
        run(fused=True)
