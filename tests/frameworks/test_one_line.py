"""Other people's trainers, unchanged, where their own line names bitsandbytes' optimizers or this package's."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.integrations.bitsandbytes import install, optim, uninstall

pytestmark = pytest.mark.filterwarnings("ignore")  # what they warn of is theirs
TOKENS = torch.randint(96, (24, 12), generator=torch.Generator().manual_seed(0))
SAMPLES = [{"input_ids": each, "labels": each} for each in TOKENS]


@pytest.fixture
def installed() -> Iterator[None]:
    install()
    yield
    uninstall()


def language_model() -> Any:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """What transformers' and TRL's training arguments share here."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }


def trained(folder: Path, callbacks: Any = None, chosen: Any = None, **options: Any) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    model = language_model()
    settings = transformers.TrainingArguments(**arguments(folder, **options))
    trainer = transformers.Trainer(
        model, settings, train_dataset=SAMPLES, optimizer_cls_and_kwargs=chosen and chosen(settings)
    )
    if callbacks:
        trainer.add_callback(callbacks(trainer))
    trainer.train()
    return trainer


def plain(optimizer: Any) -> Any:
    """What accelerate's optimizer is around."""
    return getattr(optimizer, "optimizer", optimizer)


def codes(optimizer: Any, param: Tensor) -> list[Tensor]:
    return [value for name, value in optimizer.state[param].items() if name.endswith("_codes")]


def assert_coded(optimizer: Any, param: Tensor, count: int) -> None:
    found = codes(optimizer, param)
    assert [value.dtype for value in found] == [torch.uint8] * count
    assert all(value.shape == param.shape and bool(value.any()) for value in found)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "kind", "states"),
    [
        ("adamw_8bit", "AdamW", 2),
        ("adamw_bnb_8bit", "AdamW", 2),
        ("paged_adamw_8bit", "AdamW", 2),
        ("lion_8bit", "Lion", 1),
        ("paged_lion_8bit", "Lion", 1),
        ("ademamix_8bit", "AdEMAMix", 3),
        ("rmsprop_bnb_8bit", "RMSprop", 1),
        ("paged_adamw_32bit", "AdamW", 0),
        ("lion_32bit", "Lion", 0),
    ],
)
def test_transformers(name: str, kind: str, states: int, tmp_path: Path, installed: None) -> None:
    trainer = trained(tmp_path, optim=name, weight_decay=0.1)
    optimizer = plain(trainer.optimizer)
    assert type(optimizer) is getattr(optim, kind)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    for module_name, module in trainer.model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):  # the Trainer keeps embeddings in 32 bits
            assert_coded(optimizer, module.weight, 0 if isinstance(module, nn.Embedding) else states)
            assert optimizer.state[module.weight]["step"] == 3, module_name


def test_transformers_hands_over_options_as_strings(tmp_path: Path, installed: None) -> None:
    trainer = trained(tmp_path, optim="rmsprop_bnb_8bit", optim_args="alpha=0.95,block_size=64,centered=true")
    (group, _) = plain(trainer.optimizer).param_groups
    assert (group["alpha"], group["block_size"], group["centered"]) == (0.95, 64, True)


def test_transformers_trains_as_with_the_class_itself(tmp_path: Path, installed: None) -> None:
    ours = {"betas": (0.9, 0.999), "eps": 1e-8}

    def direct(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.state_bits = 32  # type: ignore[assignment]

    found = trained(tmp_path / "line", optim="adamw_8bit")
    transformers: Any = pytest.importorskip("transformers")
    model = language_model()
    direct(model)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments(tmp_path / "class")),
        train_dataset=SAMPLES,
        optimizer_cls_and_kwargs=(opt8bit.AdamW8bit, {"lr": 1e-2, **ours}),
    )
    trainer.train()
    pairs = zip(found.model.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_transformers_stopped_and_resumed(tmp_path: Path, installed: None) -> None:
    expected = trained(tmp_path / "whole", optim="adamw_8bit", max_steps=4)
    trained(tmp_path / "stopped", optim="adamw_8bit", max_steps=2, save_strategy="steps", save_steps=2)
    transformers: Any = pytest.importorskip("transformers")
    settings = transformers.TrainingArguments(**arguments(tmp_path / "stopped", optim="adamw_8bit", max_steps=4))
    trainer = transformers.Trainer(language_model(), settings, train_dataset=SAMPLES)
    trainer.train(resume_from_checkpoint=True)
    pairs = zip(expected.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_transformers_finds_no_bitsandbytes_afterwards(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 looks once, when it is imported, and its Trainer does not ask")
    before = transformers.is_bitsandbytes_available()
    install()
    assert transformers.is_bitsandbytes_available()
    uninstall()
    assert transformers.is_bitsandbytes_available() is before


def test_the_factory_and_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    ours: Any = importlib.import_module("opt8bit.integrations.transformers")

    def chosen(settings: Any) -> Any:
        return ours.optimizer_cls_and_kwargs("adamw", settings, block_size="128")

    trainer = trained(
        tmp_path,
        lambda trainer: ours.StateErrorCallback(trainer.log),
        chosen,
        optim_args="block_size=64, betas=(0.8, 0.9), seed=3",
    )
    optimizer = plain(trainer.optimizer)
    assert type(optimizer) is opt8bit.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["block_size"], group["betas"], group["seed"], group["lr"]) == (128, (0.8, 0.9), 3, 1e-2)
    logged = [entry for entry in trainer.state.log_history if "state_bytes" in entry]
    assert [entry["step"] for entry in logged] == [2, 3]  # the first step has no states to measure
    for entry in logged:
        for state in ("exp_avg", "exp_avg_sq"):
            assert 0 < entry[f"state_error/{state}"] <= entry[f"state_error/{state}_max"] < 0.05
    expected = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert {entry["state_bytes"] for entry in logged} == {expected}
    assert expected == opt8bit.memory_report(optimizer).rows[0].state_bytes


def test_the_factory_leaves_out_what_an_optimizer_lacks(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    ours: Any = importlib.import_module("opt8bit.integrations.transformers")
    settings = transformers.TrainingArguments(**arguments(tmp_path))
    assert ours.optimizer_cls_and_kwargs("Lion", settings)[1] == {"lr": 1e-2, "betas": (0.9, 0.999)}
    assert ours.optimizer_cls_and_kwargs("SGD", settings)[1] == {"lr": 1e-2}
    assert ours.optimizer_cls_and_kwargs("AdEMAMix", settings)[1]["betas"] == (0.9, 0.999, 0.9999)
    for name in ("Muon", "muonadamw8bit"):
        with pytest.raises(ValueError, match=r"cannot be had so: the Trainer's groups .* have no names"):
            ours.optimizer_cls_and_kwargs(name, settings)
    with pytest.raises(ValueError, match="every must be a positive number"):
        ours.StateErrorCallback(print, every=0)


def test_trl(tmp_path: Path, installed: None) -> None:
    trl: Any = pytest.importorskip("trl")
    datasets: Any = pytest.importorskip("datasets")
    model = language_model()
    data = datasets.Dataset.from_list([{"input_ids": each.tolist()} for each in TOKENS])
    settings = trl.SFTConfig(**arguments(tmp_path, optim="adamw_8bit", bf16=False, max_length=12, eos_token=None))
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer(tmp_path))
    trainer.train()
    optimizer = plain(trainer.optimizer)
    assert type(optimizer) is optim.AdamW
    assert_coded(optimizer, model.model.layers[0].mlp.up_proj.weight, 2)
    assert_coded(optimizer, model.model.embed_tokens.weight, 0)


def tokenizer(folder: Path) -> Any:
    """A tokenizer with a word for each token."""
    transformers: Any = pytest.importorskip("transformers")
    tokenizers: Any = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="w0")
    made.add_special_tokens({"pad_token": "w1", "eos_token": "w2"})
    return made


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "AdamW"])
def test_peft(name: str, installed: None) -> None:
    peft: Any = pytest.importorskip("peft")
    optimizers: Any = importlib.import_module("peft.optimizers")
    config = peft.LoraConfig(r=64, target_modules=["q_proj", "up_proj"], modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(language_model(), config)
    kind = opt8bit.optim.AdamW if name == "AdamW" else getattr(optim, name)
    optimizer = optimizers.create_loraplus_optimizer(model, kind, lr=1e-3, loraplus_lr_ratio=16)
    assert {group["lr"] for group in optimizer.param_groups} >= {1e-3, 16e-3}
    model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    optimizer.step()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert_coded(optimizer, layer.lora_B["default"].weight, 2)  # A has no gradient while B is zero
    if name != "AdamW":  # a name by which PEFT takes it for bitsandbytes', and keeps embeddings in 32 bits
        embedding = model.base_model.model.model.embed_tokens.modules_to_save["default"]
        assert_coded(optimizer, embedding.weight, 0)


def test_peft_without_the_stand_in() -> None:
    """The name that PEFT does not know needs nothing else."""
    peft: Any = pytest.importorskip("peft")
    optimizers: Any = importlib.import_module("peft.optimizers")
    model = peft.get_peft_model(language_model(), peft.LoraConfig(r=64, target_modules=["up_proj"]))
    optimizer = optimizers.create_loraplus_optimizer(model, opt8bit.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    optimizer.step()
    assert_coded(optimizer, model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight, 2)


TIMM = ["adamw", "adam", "sgd", "rmsprop", "adagrad", "lion", "lamb", "lars", "ademamix"]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm: Any = pytest.importorskip("timm")
    ours: Any = importlib.import_module("opt8bit.integrations.timm")
    assert ours.register() == ours.register() and f"opt8bit{name}" in ours.register()
    assert sorted(ours.register()) == sorted(f"opt8bit{each}" for each in TIMM)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    settings: dict[str, Any] = {"block_size": "64", "eps": 1e-7}
    if name in ("adamw", "adam", "lamb", "ademamix", "lion"):
        settings["betas"] = "(0.8, 0.9, 0.99)" if name == "ademamix" else "(0.8, 0.9)"
    optimizer = timm.optim.create_optimizer_v2(model, opt=f"opt8bit{name}", lr=1e-3, weight_decay=0.05, **settings)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert all(group["block_size"] == 64 for group in optimizer.param_groups)
    model(torch.ones(4, 64)).square().mean().backward()
    model[0].weight.grad += 1e-3  # type: ignore[operator]
    optimizer.step()
    assert codes(optimizer, model[0].weight)  # type: ignore[arg-type]


def sd_scripts_optimizer(optimizer_type: str, optimizer_args: list[str], params: Any) -> Any:
    """Makes an optimizer as kohya's sd-scripts do for ``--optimizer_type`` and ``--optimizer_args``.

    Their package cannot be installed; this is what ``get_optimizer`` of ``library/train_util.py`` does for these names.
    """
    kwargs = {key: ast.literal_eval(value) for key, value in (each.split("=") for each in optimizer_args)}
    if optimizer_type.lower().endswith("8bit"):
        import bitsandbytes as bnb  # type: ignore[import-not-found]

        if optimizer_type.lower() == "sgdnesterov8bit":
            return bnb.optim.SGD8bit(params, lr=1e-4, nesterov=True, **{"momentum": 0.9, **kwargs})
        return getattr(bnb.optim, optimizer_type)(params, lr=1e-4, **kwargs)
    module, _, name = optimizer_type.rpartition(".")
    return getattr(importlib.import_module(module), name)(params, lr=1e-4, **kwargs)


@pytest.mark.parametrize(
    "name", ["AdamW8bit", "Lion8bit", "PagedAdamW8bit", "PagedLion8bit", "SGDNesterov8bit", "opt8bit.optim.AdamW"]
)
def test_sd_scripts(name: str, installed: None) -> None:
    layer = nn.Linear(64, 64)
    given = ["weight_decay=0.1", "block_size=64", *(["betas=(0.8,0.9)"] if "SGD" not in name else [])]
    optimizer = sd_scripts_optimizer(name, given, [{"params": layer.parameters(), "lr": 1e-3}])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (1e-3, 0.1)
    layer(torch.ones(2, 64)).square().sum().backward()
    optimizer.step()
    assert codes(optimizer, layer.weight) and (optimizer.param_groups[0].get("nesterov") or "SGD" not in name)


def test_axolotl(tmp_path: Path) -> None:
    """Its plugin manager and then the Trainer, which it hands ``optimizer: adamw_8bit`` on to."""
    base: Any = pytest.importorskip("axolotl.integrations.base")
    manager, name = base.PluginManager.get_instance(), "opt8bit.integrations.axolotl.Opt8bitPlugin"
    manager.register(name)
    try:
        manager.plugins[name].register({"optimizer": "adamw_8bit", "plugins": [name]})
        trainer = trained(tmp_path, optim="adamw_8bit")
    finally:
        uninstall()
    assert type(plain(trainer.optimizer)) is optim.AdamW
    assert_coded(plain(trainer.optimizer), trainer.model.model.layers[0].mlp.up_proj.weight, 2)


def test_llama_factory() -> None:
    place = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    plugin: Any = pytest.importorskip(place).OptimizerPlugin
    importlib.import_module("opt8bit.integrations.llamafactory")
    layer = nn.Linear(64, 64)
    layer.bias.requires_grad_(False)
    config = {"name": "opt8bit", "optimizer": "Lion", "lr": 1e-3, "betas": "(0.8, 0.9)", "block_size": "64"}
    optimizer = plugin("opt8bit")(layer, config)
    assert type(optimizer) is opt8bit.optim.Lion and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    layer(torch.ones(2, 64)).square().sum().backward()
    optimizer.step()
    assert_coded(optimizer, layer.weight, 1)


def test_lightning(installed: None) -> None:
    lightning: Any = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(64, 64)

        def training_step(self, batch: Any) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            import bitsandbytes as bnb  # type: ignore[import-not-found]

            return bnb.optim.AdamW8bit(self.parameters(), lr=1e-2)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 64)), batch_size=4)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, loader)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is optim.AdamW8bit
    assert_coded(optimizer, module.net.weight, 2)


@pytest.mark.parametrize(
    ("flags", "block_size"),
    [
        (["--optimizer=bitsandbytes.optim.AdamW8bit", "--optimizer.lr=0.01"], 256),
        (["--optimizer=opt8bit.AdamW8bit", "--optimizer.lr=0.01", "--optimizer.dict_kwargs.block_size=128"], 128),
    ],
)
def test_lightning_cli(installed: None, flags: list[str], block_size: int) -> None:
    lightning: Any = pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    cli = importlib.import_module("lightning.pytorch.cli")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 64)), batch_size=2)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    defaults = {"max_epochs": 1, "accelerator": "cpu", **quiet}
    run = cli.LightningCLI(Module, args=["fit", *flags], save_config_callback=None, trainer_defaults=defaults)
    (optimizer,) = run.trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.param_groups[0]["block_size"] == block_size
    assert optimizer.state[run.model.layer.weight]["exp_avg_codes"].dtype == torch.uint8
