"""Which norms and layers feed which, found by trial; and rewriting a block by a link."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import shaken

from opt8bit import ptq
from opt8bit.ptq.model.blocks import evaluating, find_blocks
from opt8bit.ptq.model.folding import Link, doubled, fold, relative_error
from opt8bit.ptq.model.links import find_links
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.model.rehearsal import rehearse
from opt8bit.ptq.model.source import InMemory
from opt8bit.ptq.tasks.causal_lm import CausalLM
from opt8bit.ptq.transforms.fold_norm import FoldNorm
from opt8bit.ptq.transforms.transform import NotTheSame, Transform, transformed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WIDTH, HEADS, INNER = 32, 4, 64
HEAD = WIDTH // HEADS
SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": HEAD}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": HEAD}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SIZES, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", SIZES),
    "bert": ("BertLMHeadModel", "BertConfig", {**SIZES, "is_decoder": True}),
}
SAME = torch.arange(WIDTH)
# Query heads 0 and 1 share values, 2 and 3 the others.
SHARED = torch.arange(2 * HEAD).view(2, 1, HEAD).expand(2, 2, HEAD).flatten()
# Of each of BLOOM's heads the last third; of Falcon's one head of values, the last columns, all query heads.
OF_BLOOM = (3 * HEAD * torch.arange(HEADS)[:, None] + 2 * HEAD + torch.arange(HEAD)).flatten()
OF_FALCON = (WIDTH + HEAD + torch.arange(HEAD)).repeat(HEADS)
GATED = {
    "self_attn.v_proj": (("self_attn.o_proj",), SHARED, 0.0, True, True),
    "mlp.up_proj": (("mlp.down_proj",), torch.arange(INNER), 0.0, True, False),
}
QKV, GATE_UP = tuple(f"self_attn.{name}_proj" for name in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
# Of each producer its consumers, channels, offset, whether factors may be negative, and whether constants pass.
LINKS: dict[str, dict[str, tuple[tuple[str, ...], Tensor, float, bool, bool]]] = {
    "llama": {
        "input_layernorm": (QKV, SAME, 0.0, True, True),
        "post_attention_layernorm": (GATE_UP, SAME, 0.0, True, True),
        **GATED,
    },
    "qwen3": {  # norms of queries and keys feed no linear layer
        "input_layernorm": (QKV, SAME, 0.0, True, True),
        "post_attention_layernorm": (GATE_UP, SAME, 0.0, True, True),
        **GATED,
    },
    "gemma3": {  # norms behind a layer feed the hidden states
        "input_layernorm": (QKV, SAME, 1.0, True, True),
        "pre_feedforward_layernorm": (GATE_UP, SAME, 1.0, True, True),
        **GATED,
    },
    "opt": {
        "self_attn_layer_norm": (tuple(f"self_attn.{name}_proj" for name in "kvq"), SAME, 0.0, True, True),
        "self_attn.v_proj": (("self_attn.out_proj",), SAME, 0.0, True, True),
        "final_layer_norm": (("fc1",), SAME, 0.0, True, True),
        "fc1": (("fc2",), torch.arange(INNER), 0.0, False, False),  # through a ReLU
    },
    "gpt2": {
        "ln_1": (("attn.c_attn",), SAME, 0.0, True, True),
        "attn.c_attn": (("attn.c_proj",), 2 * WIDTH + SAME, 0.0, True, True),
        "ln_2": (("mlp.c_fc",), SAME, 0.0, True, True),
    },
    "bloom": {
        "input_layernorm": (("self_attention.query_key_value",), SAME, 0.0, True, True),
        "self_attention.query_key_value": (("self_attention.dense",), OF_BLOOM, 0.0, True, True),
        "post_attention_layernorm": (("mlp.dense_h_to_4h",), SAME, 0.0, True, True),
    },
    "falcon": {  # attention and MLP are side by side
        "input_layernorm": (("self_attention.query_key_value", "mlp.dense_h_to_4h"), SAME, 0.0, True, True),
        "self_attention.query_key_value": (("self_attention.dense",), OF_FALCON, 0.0, True, True),
    },
    "bert": {  # its norms are read by the hidden states, too
        "attention.self.value": (("attention.output.dense",), SAME, 0.0, True, True),
    },
}


def made(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    model_class, config_class, sizes = CLASSES[name]
    return shaken(getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)))


def first_block(model: Any) -> tuple[nn.Module, Call]:
    prefix, blocks = find_blocks(model)
    few = CausalLM().smallest({"input_ids": torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(1))})
    with evaluating(model):
        known = rehearse(InMemory(model), prefix, blocks, few)
        return blocks[0], known.calls(model, blocks, few)[0]


@pytest.mark.parametrize("name", LINKS)
def test_links_are_found(name: str) -> None:
    block, call = first_block(made(name))
    before = copy.deepcopy(block.state_dict())
    found = {link.producer: link for link in find_links(block, call)}
    assert found.keys() == LINKS[name].keys()
    for producer, (consumers, channels, offset, negative, shifts) in LINKS[name].items():
        link = found[producer]
        assert link.consumers == consumers and torch.equal(link.channels, channels)
        assert (link.offset, link.negative, link.shifts) == (offset, negative, shifts)
        # Gemma multiplies in float32, whatever the block's dtype is.
        assert link.error < (1e-6 if name == "gemma3" and "norm" in producer else 1e-12)
    assert all(torch.equal(param, before[key]) for key, param in block.state_dict().items())


def test_links_are_found_in_an_encoder() -> None:
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    config = transformers.WhisperConfig(
        d_model=WIDTH, encoder_attention_heads=HEADS, encoder_ffn_dim=INNER, encoder_layers=1
    )
    config._attn_implementation = "eager"
    block = shaken(module.WhisperEncoderLayer(config))
    hidden = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    found = {link.producer: link for link in find_links(block, Call(hidden, (), {"attention_mask": None}))}
    assert found.keys() == {"self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm"}  # GELU lets no factor by
    assert found["self_attn_layer_norm"].consumers == tuple(f"self_attn.{name}_proj" for name in "kvq")
    assert found["self_attn.v_proj"].shifts and found["final_layer_norm"].consumers == ("fc1",)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "falcon", "gpt2"])
def test_a_block_that_is_folded_computes_the_same(name: str) -> None:
    block, call = first_block(made(name))
    exact, reference = copy.deepcopy(block).double(), copy.deepcopy(block).double()
    with torch.no_grad():
        for link in find_links(block, call):
            size = int(link.channels.max()) + 1
            weight = exact.get_submodule(link.producer).weight
            rows = max(weight.shape) if name == "gpt2" and weight.dim() == 2 else weight.shape[0]  # type: ignore[union-attr,index]
            scale = torch.ones(rows, dtype=torch.float64)  # type: ignore[arg-type]
            scale[link.channels] = torch.linspace(0.3, 3, size, dtype=torch.float64)[link.channels]
            fold(exact, link, scale)
        assert relative_error(doubled(call), exact, reference) < (1e-6 if name == "gemma3" else 1e-13)
    changed = [key for key, param in exact.state_dict().items() if not torch.equal(param, reference.state_dict()[key])]
    assert len(changed) > 3


def test_what_another_module_reads_is_no_link() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return x + self.layer(normed) + normed.square()

    call = Call(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)), (), {})
    assert find_links(shaken(Block()), call) == []


def test_experts_are_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 2)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            chosen = self.router(normed).mean((0, 1)).argmax()
            return x + self.experts[int(chosen)](normed)

    call = Call(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)), (), {})
    assert find_links(shaken(Block()), call) == []


def test_norms_are_folded_into_what_reads_them() -> None:
    block, call = first_block(made("gemma3"))
    changed = transformed("block", block, call, [FoldNorm()])
    scales: Any = block.get_submodule("input_layernorm.weight".rpartition(".")[0])
    assert torch.allclose(scales.weight, torch.zeros(WIDTH), atol=1e-6)  # Gemma's scale is 1 + weight
    assert {"input_layernorm.weight", "self_attn.q_proj.weight", "mlp.up_proj.weight"} <= changed.keys()
    assert "self_attn.o_proj.weight" not in changed and "post_attention_layernorm.weight" not in changed


def test_a_transform_that_changes_the_function_is_refused() -> None:
    class Wrong(Transform):
        def scale(self, block: nn.Module, link: Link) -> Tensor | None:
            size = int(link.channels.max()) + 1
            return torch.full((size,), 1e308, dtype=torch.float64)  # what a norm puts out is infinite

    block, call = first_block(made("llama"))
    with pytest.raises(NotTheSame, match=r"^block: .* change what the block computes, by nan of its output$"):
        transformed("block", block, call, [Wrong()])


class Multiplied(Transform):
    """Makes what linear layers put out larger."""

    def __init__(self, by: float) -> None:
        self.by = by

    def scale(self, block: nn.Module, link: Link) -> Tensor | None:
        producer: Any = block.get_submodule(link.producer)
        return torch.full((len(producer.weight),), self.by) if isinstance(producer, nn.Linear) else None


def bounded() -> Any:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64}
    return shaken(transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, **sizes, activation_function="relu6")))


def test_there_is_no_link_through_a_bound() -> None:
    block, call = first_block(bounded())
    assert "fc1" not in {link.producer for link in find_links(block, call)}


class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).clamp(-6, 6))


class InPlace(Transform):
    """Rewrites the block behind the library's back."""

    def __init__(self, by: float, undone: bool) -> None:
        self.by, self.undone = by, undone

    @torch.no_grad()
    def scale(self, block: nn.Module, link: Link) -> Tensor | None:
        first, second = (block.get_parameter(f"{name}.weight").data for name in ("first", "second"))
        first.mul_(self.by)
        if self.undone:
            second.div_(self.by)
        return None


def test_the_block_that_is_used_is_compared_on_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a copy alone; and where a few tokens do not reach a bound, others may."""
    link = Link("first", ("second",), torch.arange(8))
    monkeypatch.setattr("opt8bit.ptq.transforms.transform.find_links", lambda *args: [link])
    many = Call(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)), (), {})
    few = many._replace(hidden=many.hidden / 100)
    off = r"^block: after .* is off by .* of its output, and by .* before$"
    with pytest.raises(NotTheSame, match=off):
        transformed("block", shaken(Bounded()), few, [InPlace(2.0, undone=False)])
    transformed("block", shaken(Bounded()), few, [InPlace(2.0, undone=True)])
    with pytest.raises(NotTheSame, match=off):
        transformed("block", shaken(Bounded()), few, [InPlace(2.0, undone=True)], [many])


@pytest.mark.parametrize("by", [1e38, 1e-44])
def test_factors_that_a_dtype_cannot_hold_are_refused(by: float) -> None:
    block, call = first_block(made("llama"))
    with pytest.raises(NotTheSame, match=r"^block: "):
        transformed("block", block, call, [Multiplied(by)])


@pytest.mark.parametrize("work", [False, True])
def test_a_model_with_folded_norms_is_exported_and_loaded(work: bool, tmp_path: Any) -> None:
    transformers: Any = pytest.importorskip("transformers")
    model = made("llama")
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ptq.compress(
            ptq.Checkpoint(tmp_path / "model"),
            ids,
            bits=8,
            group_size=16,
            transforms=["fold_norm"],
            overrides={"*.1.*": None},
            checkpoint_format="dense",
            work=tmp_path / "work" if work else None,
        )
    assert len(result.report) == 7 and result.recipe.to_dict()["transforms"] == ["fold_norm"]
    out = ptq.export(result, tmp_path / "out", format="dense")
    assert ptq.verify(out).is_right
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for i in range(2):  # layers that are left as they are read folded norms, too
        assert torch.allclose(loaded.model.layers[i].input_layernorm.weight, torch.ones(WIDTH), atol=1e-6)
    with torch.no_grad():
        error = (loaded(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert error < 0.02
    assert all(torch.equal(param, before[name]) for name, param in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["fold"], ValueError, "transforms, each of them, must be one of fold_norm, got 'fold'"),
        ("fold_norm", ValueError, "transforms must be a list, got 'fold_norm'"),
        ([3], TypeError, "transforms must be names, or transforms, got 3"),
    ],
)
def test_transforms_are_checked(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ptq.compress(made("llama"), torch.zeros(2, 8, dtype=torch.int64), group_size=16, transforms=given)
