"""diffusers' models, and the branch of its training scripts for ``--use_8bit_adam``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from opt8bit.integrations.bitsandbytes import install, optim, uninstall

pytestmark = pytest.mark.filterwarnings("ignore")  # what it warns of is its own
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def unet(diffusers: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model, {"encoder_hidden_states": torch.ones(2, 3, 64)}


def dit(diffusers: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=8
    )
    return model, {"class_labels": torch.tensor([1, 2])}


@pytest.mark.parametrize("make", [unet, dit])
def test_use_8bit_adam(make: Any) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, condition = make(diffusers)
    install()
    try:
        import bitsandbytes as bnb  # type: ignore[import-not-found]

        optimizer_cls = bnb.optim.AdamW8bit
    finally:
        uninstall()
    optimizer = optimizer_cls(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    assert type(optimizer) is optim.AdamW8bit
    for step in range(2):
        found = model(LATENTS, timestep=torch.tensor([3, 5 + step]), return_dict=False, **condition)[0]
        found.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        if state and param.dim() > 1 and param.numel() >= 4096:
            assert state["exp_avg_codes"].dtype == torch.uint8 and state["exp_avg_codes"].any(), name
    assert sum("exp_avg_codes" in state for state in optimizer.state.values()) > len(optimizer.state) // 4
