import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opt8bit import AdamW8bit, StableEmbedding, replace_embeddings


def takes_32_bits(weight: Tensor) -> bool:
    optimizer = AdamW8bit([weight], min_8bit_size=0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert ("exp_avg" in state) != ("exp_avg_codes" in state)
    return "exp_avg" in state and state["exp_avg"].dtype == torch.float32


def test_output_is_the_layer_norm_of_the_row() -> None:
    embedding = StableEmbedding(10, 32)
    tokens = torch.tensor([[1, 2], [2, 9]])
    expected = nn.functional.layer_norm(embedding.weight[tokens], (32,))
    torch.testing.assert_close(embedding(tokens), expected)
    assert embedding(tokens).shape == (2, 2, 32)


def test_weights_are_xavier_uniform() -> None:
    weight = StableEmbedding(1000, 64).weight
    bound = math.sqrt(6 / 1064)
    assert weight.abs().max() <= bound
    # The mean square of a uniform distribution, within six standard errors: sqrt(4/45) * bound^2 / sqrt(n).
    error = 6 * math.sqrt(4 / 45) * bound**2 / math.sqrt(64_000)
    assert weight.square().mean().item() == pytest.approx(bound**2 / 3, abs=error)


def test_a_given_weight_is_taken_as_it_is() -> None:
    weight = torch.randn(10, 16, dtype=torch.float64)
    embedding = StableEmbedding.from_pretrained(weight)
    assert embedding(torch.tensor([1])).dtype == torch.float64 and embedding.weight.data_ptr() == weight.data_ptr()


def test_padding_row_is_zero_and_learns_nothing() -> None:
    embedding = StableEmbedding(10, 16, padding_idx=3)
    assert not embedding.weight[3].any() and embedding.weight[4].any()
    embedding(torch.tensor([3, 4])).square().sum().backward()
    grad = embedding.weight.grad
    assert grad is not None and not grad[3].any()


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 0.5, "norm_type": 1.0},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"_weight": torch.ones(10, 16)},
        {"_freeze": True},
        {"dtype": torch.bfloat16},
        {"device": "meta"},
    ],
)
def test_the_rest_of_the_signature_is_embeddings(options) -> None:
    stable, plain = StableEmbedding(10, 16, **options), nn.Embedding(10, 16, **options)
    for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
        assert getattr(stable, name) == getattr(plain, name)
    assert stable.weight.requires_grad == plain.weight.requires_grad
    assert stable.weight.dtype == plain.weight.dtype == stable.norm.weight.dtype
    assert stable.weight.device == plain.weight.device == stable.norm.weight.device


def pickled(embedding: StableEmbedding) -> StableEmbedding:
    return pickle.loads(pickle.dumps(embedding))


def saved(embedding: StableEmbedding) -> StableEmbedding:
    file = io.BytesIO()
    torch.save(embedding, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(embedding: StableEmbedding) -> StableEmbedding:
    other = StableEmbedding(64, 64)
    other.load_state_dict(embedding.state_dict())
    return other


def assigned(embedding: StableEmbedding) -> StableEmbedding:
    other = StableEmbedding(64, 64, device="meta")
    other.load_state_dict(embedding.state_dict(), assign=True)
    return other


def inside_a_model(embedding: StableEmbedding) -> StableEmbedding:
    model: Any = copy.deepcopy(nn.Sequential(embedding).to(torch.bfloat16))
    return model[0]


@pytest.mark.parametrize(
    "carry",
    [
        lambda embedding: embedding,
        copy.deepcopy,
        copy.copy,
        pickled,
        saved,
        loaded,
        assigned,
        inside_a_model,
        lambda embedding: embedding.to(torch.bfloat16),
        lambda embedding: embedding.to("meta").to_empty(device="cpu"),
        lambda embedding: embedding.double().float(),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_states_stay_32_bit(carry, overwrite: bool) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        embedding = carry(StableEmbedding(64, 64))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert takes_32_bits(embedding.weight)
    assert not takes_32_bits(nn.Embedding(64, 64).weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 64, padding_idx=0)
        self.again = self.tokens
        self.inner = nn.Sequential(nn.Embedding(8, 64, max_norm=2.0), nn.Linear(64, 64))
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.tokens.weight


def test_replacing_keeps_weights_ties_and_options() -> None:
    model = Tied().eval()
    weight = model.tokens.weight
    assert replace_embeddings(model) is model
    assert type(model.tokens) is StableEmbedding and model.again is model.tokens
    assert model.tokens.weight is weight is model.head.weight
    assert model.tokens.padding_idx == 0 and not model.tokens.training
    assert type(model.inner[0]) is StableEmbedding and model.inner[0].max_norm == 2.0
    assert takes_32_bits(model.head.weight)


def test_replacing_an_embedding_itself() -> None:
    plain = nn.Embedding(8, 16)
    stable = replace_embeddings(plain)
    assert type(stable) is StableEmbedding and stable.weight is plain.weight
    assert replace_embeddings(stable) is stable
