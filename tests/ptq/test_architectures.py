"""Whatever an architecture passes from block to block: the streams are the models', and runs leave no traces."""

import warnings
from typing import Any

import pytest
import torch
from architectures import CONFIGURATIONS, WINDOW, make, token_ids
from torch import Tensor

from opt8bit import ptq
from opt8bit.ptq.tasks.causal_lm import CausalLM

LEFT = {"bart", "falcon_mamba", "jamba", "llama4_text", "mamba", "phimoe", "gemma3n_text"}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What :meth:`CausalLM.quality` is given: the end, the batches, and the last hidden states of both models."""
    seen: list[tuple[Any, ...]] = []

    quality = CausalLM.quality

    def watched(task: CausalLM, *args: Any, **options: Any) -> Any:
        seen.append(args)
        return quality(task, *args, **options)

    monkeypatch.setattr(CausalLM, "quality", watched)
    return seen


def model_of(name: str) -> Any:
    model = make(name)
    return pytest.skip(f"transformers has no {name}") if model is None else model


def compress(model: Any, ids: Tensor, **options: Any) -> ptq.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that stay as they are
        return ptq.compress(model, ids, **{"bits": 4, "group_size": None, "batch_size": 2, **options})


@pytest.mark.parametrize("length", [WINDOW - 2, 3 * WINDOW])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_both_streams_end_in_the_logits_of_their_models(name: str, length: int, streams: list[tuple[Any, ...]]) -> None:
    model, ids = model_of(name), token_ids(3, length)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    result = compress(model, ids, method=ptq.RTN(), held_out=ids)
    [(end, batches, exact, compressed)] = streams
    assert result.probe is not None
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
        rounded = result.compressed_model()
        for batch, x, x_hat in zip(batches, exact, compressed, strict=True):
            for of, hidden in ((model, x), (rounded, x_hat)):
                torch.testing.assert_close(end.logits(batch, hidden), of(**batch).logits, rtol=1e-4, atol=1e-4)
        expected = rounded(**result.probe.inputs).logits[0, -len(result.probe.logits) :]
        torch.testing.assert_close(result.probe.logits, expected, rtol=1e-4, atol=1e-4)
        assert (rounded(input_ids=ids).logits - before).norm() > 1e-3 * before.norm()
