from types import SimpleNamespace

import torch

from opt8bit.ptq.tasks.causal_lm import CausalLM


def test_a_divergence_is_never_below_zero() -> None:
    """Of predictions that differ in their last bits, the sum over a vocabulary rounds to either side of zero."""
    end = SimpleNamespace(logits=lambda batch, hidden: hidden)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, 8, 50, generator=generator)
        batch = {"input_ids": torch.randint(50, (1, 8), generator=generator)}
        found = CausalLM().quality(end, [batch], [logits], [logits * (1 + 2e-7)])  # type: ignore[arg-type]
        assert found is not None and 0 <= found.kl_divergence < 1e-6
