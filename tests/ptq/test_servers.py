"""What is said of servers before a packed checkpoint is made, and what its header tells them."""

import re
import warnings
from typing import Any

import pytest
import torch
from architectures import make
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.export.compressed_tensors import CompressedTensors, experts_of
from opt8bit.ptq.model.servers import Layer, Packing, warnings_of, who_skips

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GOOD = Packing(4, True, 64)
LAYERS = {
    f"layers.{i}.{name}": Layer((64, 128), GOOD)
    for i in range(2)
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
}


def said(changes: dict[str, Layer], format: str = "compressed-tensors", *, has_experts: bool = False) -> list[str]:
    return warnings_of(format, {**LAYERS, **changes}, "layers", 2, has_experts=has_experts)


def everywhere(*packing: Any) -> dict[str, Layer]:
    return {name: Layer((64, 128), Packing(*packing)) for name in LAYERS}


@pytest.mark.parametrize("packing", [(4, True, 64), (4, True, 32), (8, True, None), (4, False, 128)], ids=str)
def test_nothing_is_said_of_what_servers_run(packing: tuple[Any, ...]) -> None:
    assert said(everywhere(*packing)) == []


@pytest.mark.parametrize(
    ("packing", "todo"),
    [
        ((3, True, 64), "3 bits, symmetric, groups of 64: use 4 or 8 bits, symmetric, or format 'dense'"),
        ((3, False, None), "3 bits, asymmetric, whole rows: use 4 or 8 bits, symmetric, or format 'dense'"),
        ((8, False, 64), "8 bits, asymmetric, groups of 64: use symmetric grids, or format 'dense'"),
        (
            (4, True, 16),
            "4 bits, symmetric, groups of 16: use groups of 32, 64 or 128 or whole rows, or format 'dense'",
        ),
    ],
    ids=str,
)
def test_what_a_server_does_not_run_is_said_with_what_it_runs(packing: tuple[Any, ...], todo: str) -> None:
    assert said(everywhere(*packing)) == [
        f"vLLM 0.33.0 runs on NVIDIA GPUs only, if at all (Humming kernels): {todo}",
        f"SGLang 0.5.23 does not run {todo}",
    ]


def test_dense_checkpoints_are_for_all_and_gptqs_have_groups_of_some_sizes() -> None:
    assert said(everywhere(3, False, 16), "dense") == []
    (line,) = said(everywhere(4, True, 16), "gptq")
    assert line.startswith("vLLM 0.33.0 refuses 4 bits, symmetric, groups of 16: use groups of 32, 64 or 128")


@pytest.mark.parametrize("packing", [None, Packing(8, True, 64), Packing(4, True, 32), Packing(4, False, 64)], ids=str)
@pytest.mark.parametrize("name", ["attn.k_proj", "mlp.up_proj"])
def test_layers_of_one_matrix_are_to_be_alike(name: str, packing: Packing | None) -> None:
    (line,) = said({f"layers.{i}.{name}": Layer((64, 128), packing) for i in range(2)})
    group = ("q", "k", "v") if "attn" in name else ("gate", "up")
    names = ", ".join(f"layers.*.{name.partition('.')[0]}.{part}_proj (64 × 128)" for part in group)
    assert line == (
        f"vLLM 0.33.0 and SGLang 0.5.23 put these into one matrix, and refuse them, or get them wrong, where they are "
        f"not packed alike: {names}: give them the same bits, grids and group size, or leave all of them as they are, "
        "or use format 'dense'"
    )


def test_layers_of_other_matrices_may_differ() -> None:
    assert said({"layers.0.attn.o_proj": Layer((64, 128), None)}) == []


def test_all_experts_of_a_block_are_to_be_alike() -> None:
    def experts(last: Packing | None) -> dict[str, Layer]:
        return {f"layers.0.mlp.experts.{i}.down_proj": Layer((64, 64), last if i == 3 else GOOD) for i in range(4)}

    assert said(experts(GOOD)) == []
    assert "layers.0.mlp.experts.3.down_proj" in said(experts(None))[0]


def test_shapes_that_a_kernel_lacks_are_named() -> None:
    (line,) = said({"layers.1.attn.o_proj": Layer((64, 96), GOOD)})
    assert line == (
        "SGLang 0.5.23 does not run weights whose inputs or outputs are no multiple of 64: layers.1.attn.o_proj "
        "(64 × 96): leave them as they are, by an override in a recipe with \"skip\": true, or use format 'dense'"
    )
    together = {"layers.0.attn.k_proj": Layer((32, 128), GOOD), "layers.0.attn.v_proj": Layer((32, 128), GOOD)}
    assert said(together) == []  # one matrix of 128 outputs


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.router", "mlp.router.layer", "mlp.shared_expert_gate"])
def test_routers_are_to_be_left(name: str) -> None:
    router = {f"layers.{i}.{name}": Layer((64, 128), GOOD) for i in range(2)}
    (line,) = said(router, has_experts=True)
    assert line == (
        f"vLLM 0.33.0 and SGLang 0.5.23 look for unpacked routers: leave layers.*.{name} (64 × 128) as they are, by an "
        'override in a recipe with "skip": true'
    )
    assert said(router) == []
    assert said({key: Layer((64, 128), None) for key in router}, has_experts=True) == []


def test_it_is_said_before_the_work_and_after_what_is_refused() -> None:
    begun = []
    options: dict[str, Any] = {"bits": 4, "group_size": 16, "checkpoint_format": "compressed-tensors"}
    overrides = {"*.k_proj": {"bits": 8}}
    with pytest.warns(UserWarning, match="not every server runs what will be written") as caught:
        with pytest.raises(KeyboardInterrupt):
            ptq.compress(
                MODELS["llama"](),
                token_ids(),
                symmetric=True,
                overrides=overrides,
                see=lambda report, count: begun.append(len(caught)) or _stop(),
                **options,
            )
    assert begun == [1]
    (message,) = [str(each.message) for each in caught]
    assert "model.layers.*.self_attn.k_proj (16 × 32)" in message and "not packed alike" in message
    with pytest.raises(ValueError, match="fits no layer"):
        ptq.compress(MODELS["llama"](), token_ids(), overrides={"nothing": None}, **options)


def _stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "layer", "servers"),
    [
        ("gemma", "q_proj", "vLLM 0.33.0 and SGLang 0.5.23"),
        ("cohere", "o_proj", "vLLM 0.33.0 and SGLang 0.5.23"),
        ("qwen3", "o_proj", "vLLM 0.33.0"),
        ("llama", "down_proj", "SGLang 0.5.23"),
        ("granite", "q_proj", "SGLang 0.5.23"),
        ("llama", "o_proj", None),
        ("qwen3", "q_proj", None),
        ("opt", "fc1", None),
    ],
)
def test_biases_that_servers_skip_are_known(kind: str, layer: str, servers: str | None) -> None:
    found = who_skips(kind, layer)
    assert found == (None if servers is None else f"{servers} loads this bias and does not use it")


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("llama", {"gate_proj", "up_proj", "down_proj"}),
        ("mistral-full", {"gate_proj", "up_proj", "down_proj"}),  # written as a LLaMA
        ("qwen3", {"o_proj"}),
        ("opt", set()),
    ],
)
def test_the_report_names_biases_that_servers_skip(name: str, skipped: set[str]) -> None:
    result = ptq.compress(MODELS[name](), token_ids(), group_size=16, bias_correction="sequential", method=ptq.RTN())
    noted = {row.name.rpartition(".")[2] for row in result.report if "does not use it" in row.note}
    assert noted == skipped
    assert all(row.bias_place for row in result.report if "does not use it" in row.note)


# What vLLM asks for when it looks for the experts of the first block.
EXPERTS = {
    "gpt_oss": "model.layers.0.mlp.experts.0.gate_proj",
    "granitemoe": "model.layers.0.block_sparse_moe.experts.0.w1",
    "jetmoe": "model.layers.0.mlp.experts.0.w1",
    "llama4_text": "language_model.model.layers.0.feed_forward.experts.0.down_proj",  # of the model with images
}


@pytest.mark.parametrize("name", EXPERTS)
def test_servers_look_for_no_packed_weights_in_experts_that_are_one_tensor(name: str) -> None:
    matching = pytest.importorskip("compressed_tensors.utils.match")
    model = make(name)
    if model is None:
        pytest.skip("not in this version of transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays as it is
        result = ptq.compress(model, token_ids(), group_size=16, symmetric=True, method=ptq.RTN())
    ignored = CompressedTensors().quantization(result)["ignore"]
    linear = torch.nn.Linear(1, 1)

    def is_ignored(layer: str) -> bool:
        by_package = matching.is_match(layer, linear, ignored)
        by_vllm = any(re.match(each[3:], layer) if each[:3] == "re:" else each == layer for each in ignored)
        assert by_package == by_vllm
        return by_vllm

    assert is_ignored(EXPERTS[name]) and is_ignored(EXPERTS[name].rpartition(".0.")[0])
    assert not any(is_ignored(row.name) for row in result.report)


def test_experts_go_by_the_names_that_servers_have() -> None:
    assert experts_of("blocks.0.ffn.experts.mlp") == ["blocks.0.ffn.experts"]
    assert experts_of("layers.0.moe.input_linear") == ["layers.0.moe.input_linear", "layers.0.moe.experts"]
