"""LoRA through PEFT on a compressed checkpoint, with 8-bit optimizer states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import opt8bit
from opt8bit import ptq

pytestmark = pytest.mark.filterwarnings("ignore")  # what they warn of is theirs
BLOCKS = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize("format", ["compressed-tensors", "dense"])
def test_adapters_are_trained_on_a_checkpoint_that_stays_as_it_is(format: str, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.randint(0, 96, (8, 32))
    model = transformers.LlamaForCausalLM(config)
    result = ptq.compress(model, ids, bits=4, group_size=32, bias_correction="sequential")
    ptq.export(result, tmp_path / "out", format=format)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = {name: param.detach().clone() for name, param in loaded.named_parameters()}
    assert all(f"{name}.bias" in weights for name in BLOCKS)

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(loaded, lora)
    trained = [param for param in model.parameters() if param.requires_grad]
    assert len(trained) == 2 * len(BLOCKS)
    optimizer = opt8bit.AdamW8bit(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1

    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert all(torch.equal(weights[name], param) for name, param in again.named_parameters())
        model = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - logits).abs().max() > 0.01
