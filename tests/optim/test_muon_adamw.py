"""MuonAdamW8bit: which parameters have which rule, batches and heads, and that each group is stepped as its rule is."""

import copy
import doctest
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import gradients
from torch import Tensor, nn

import opt8bit
from opt8bit.backends import native
from opt8bit.backends.interface import BatchStep
from opt8bit.optim import muon_adamw
from opt8bit.optim.muon import muon
from opt8bit.optim.newton_schulz import PANEL, orthogonalized

pytestmark = pytest.mark.usefixtures("one_thread")
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ByName = dict[str, nn.Parameter]


def named(**shapes: tuple[int, ...]) -> ByName:
    """Parameters by names in which a double underscore stands for a dot."""
    generator = torch.Generator().manual_seed(0)
    return {
        name.replace("__", "."): nn.Parameter(torch.randn(shape, generator=generator) / 8)
        for name, shape in shapes.items()
    }


MODEL: dict[str, tuple[int, ...]] = {
    "tokens__weight": (100, 64),
    "layer__attention__q__weight": (64, 64),
    "layer__attention__q__bias": (64,),
    "layer__experts__up": (4, 96, 64),
    "layer__experts__up_bias": (4, 96),
    "layer__filter__weight": (64, 1, 4),
    "lm_head__weight": (100, 64),
}
OF_MUON = {"layer.attention.q.weight", "layer.experts.up"}


def by_muon(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The names of the parameters that Muon steps, each with its number of heads."""
    groups = [group for group in optimizer.param_groups if group["use_muon"]]
    return {name: group["heads"] for group in groups for name in group["param_names"]}


def step(optimizer: torch.optim.Optimizer, params: ByName, seed: int) -> None:
    for i, param in enumerate(params.values()):
        param.grad = gradients(1, tuple(param.shape), 100 * seed + i)[0].clamp(-1, 1)
    optimizer.step()


def test_the_example_is_true() -> None:
    assert doctest.testmod(muon_adamw, extraglobs={"torch": torch}).attempted
    assert not doctest.testmod(muon_adamw, extraglobs={"torch": torch}).failed


def test_names_and_shapes_choose() -> None:
    params = named(**MODEL)
    optimizer = opt8bit.MuonAdamW8bit(params.items())
    assert set(by_muon(optimizer)) == OF_MUON
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(params)
    assert all(name in repr(optimizer) for name in params)


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"),
        *("tok_embeddings.weight", "output.weight", "classifier.weight", "score.weight", "head.weight", "positions"),
        *("embeddings.cls_token", "relative_attention_bias.weight", "experts.gate_up_proj_bias", "q_norm.weight"),
    ],
)
def test_embeddings_heads_norms_and_biases_are_known_by_name(name: str) -> None:
    optimizer = opt8bit.MuonAdamW8bit([(name, nn.Parameter(torch.zeros(8, 8)))])
    assert not by_muon(optimizer)


def test_of_a_module_embeddings_are_known_by_type() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 64)
            self.stable = opt8bit.StableEmbedding(50, 64)
            self.inner = nn.Linear(64, 64)
            self.out = nn.Linear(64, 50, bias=False)
            self.out.weight = self.words.weight

    assert set(by_muon(opt8bit.MuonAdamW8bit(Model()))) == {"inner.weight"}
    assert set(by_muon(opt8bit.MuonAdamW8bit(Model(), muon=["words.*"]))) == {"inner.weight", "words.weight"}


class WithHead(nn.Module):
    """A model whose head has the name ``output`` and, unless it is of another size, the shape of its embedding."""

    def __init__(self, outputs: int = 50) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(50, 64)
        self.q_proj = nn.Linear(64, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.output = nn.Linear(64, outputs, bias=False)


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "": lambda model: model,
    "module.": nn.DataParallel,
    "_orig_mod.": lambda model: torch.compile(model, backend="eager"),
    "model.": Holder,
    "module._orig_mod.": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("as_names", [True, False])
@pytest.mark.parametrize("outputs", [50, 10])
def test_wrapped_models_are_divided_as_they_are_bare(prefix: str, as_names: bool, outputs: int) -> None:
    model = WRAPPERS[prefix](WithHead(outputs))
    optimizer = opt8bit.MuonAdamW8bit(model.named_parameters() if as_names else model, heads={"*q_proj.weight": 4})
    assert by_muon(optimizer) == {prefix + "q_proj.weight": 4}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "modules_to_save.new."]
)
def test_patterns_fit_names_with_and_without_what_wrappers_put_in(prefix: str) -> None:
    params = {f"{prefix}layer.{prefix}{name}.weight": nn.Parameter(torch.zeros(8, 8)) for name in "abc"}
    first, second, third = params
    for patterns in (["layer.b.weight"], [second]):
        assert set(by_muon(opt8bit.MuonAdamW8bit(params.items(), adamw=patterns))) == {first, third}
        assert by_muon(opt8bit.MuonAdamW8bit(params.items(), heads=dict.fromkeys(patterns, 4)))[second] == 4
    head = f"lm_head.{prefix}weight"
    assert not by_muon(opt8bit.MuonAdamW8bit([(head, nn.Parameter(torch.zeros(8, 8)))]))


@pytest.mark.parametrize("name", ["layers.0.output.weight", "attention.output.weight", "attention.output.dense.weight"])
def test_outputs_of_hidden_layers_are_no_heads(name: str) -> None:
    assert by_muon(opt8bit.MuonAdamW8bit([(name, nn.Parameter(torch.zeros(8, 8)))]))


def test_of_a_module_a_head_is_the_only_linear_of_the_shape_of_an_embedding() -> None:
    layers = [nn.Embedding(50, 64), nn.Embedding(256, 64), nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(64, 50)]
    optimizer = opt8bit.MuonAdamW8bit(nn.Sequential(*layers))
    assert set(by_muon(optimizer)) == {"2.weight", "3.weight"}


def test_patterns_come_before_all_but_what_groups_say() -> None:
    params = named(**MODEL)
    optimizer = opt8bit.MuonAdamW8bit(params.items(), muon=["lm_head*"], adamw=["*experts.up"])
    assert set(by_muon(optimizer)) == {"layer.attention.q.weight", "lm_head.weight"}
    matrices = {name: param for name, param in params.items() if param.dim() == 2}
    optimizer = opt8bit.MuonAdamW8bit(matrices.items(), use_muon=True, adamw=["tokens*", "lm_head*"])
    assert set(by_muon(optimizer)) == {"layer.attention.q.weight", "layer.experts.up_bias"}
    optimizer = opt8bit.MuonAdamW8bit(matrices.items(), use_muon=False, muon=["lm_head*"])
    assert set(by_muon(optimizer)) == {"lm_head.weight"}
    with pytest.raises(ValueError, match=r"adamw must not fit 'lm_head.weight', whose group says use_muon=True"):
        opt8bit.MuonAdamW8bit([{"params": matrices.items(), "use_muon": True}], adamw=["lm_head*"])


def test_heads_of_a_group_are_its_own() -> None:
    params = named(q__weight=(64, 64), q__bias=(64,), k__weight=(32, 64))
    for heads in (4, {"*.weight": 4}):
        optimizer = opt8bit.MuonAdamW8bit([{"params": list(params.items()), "heads": heads}], heads={"k.*": 2})
        assert by_muon(optimizer) == {"q.weight": 4, "k.weight": 4}
        assert [group["heads"] for group in optimizer.param_groups if not group["use_muon"]] == [1]
    with pytest.raises(ValueError, match=r"heads must have patterns that fit .* that Muon steps, got 'q.bias'"):
        opt8bit.MuonAdamW8bit([{"params": list(params.items()), "heads": {"q.bias": 4}}])


def test_groups_that_are_none_are_refused() -> None:
    param = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'tuple'>"):
        opt8bit.MuonAdamW8bit([{"params": [("b", param)]}, ("a", param)])
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
        opt8bit.MuonAdamW8bit([param], use_muon=True).add_param_group([param])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="param_names must be as many as params, got 2 for 1"):
        opt8bit.MuonAdamW8bit([{"params": [param], "param_names": ["a", "b"]}])
    with pytest.raises(TypeError, match="names of parameters must be strings, got 5"):
        opt8bit.MuonAdamW8bit([(5, param)])


def test_each_kind_has_its_hyper_parameters_and_schedulers_see_both() -> None:
    given = {"lr": 0.02, "adamw_lr": 3e-4, "weight_decay": 0.1, "adamw_weight_decay": 0.01, "betas": (0.9, 0.95)}
    optimizer = opt8bit.MuonAdamW8bit(named(**MODEL).items(), **given, adamw_eps=1e-6)
    for group in optimizer.param_groups:
        found = group["lr"], group["weight_decay"], group["eps"]
        assert found == ((0.02, 0.1, 1e-7) if group["use_muon"] else (3e-4, 0.01, 1e-6))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.step()
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 1.5e-4}


def test_groups_are_divided_and_keep_what_they_say() -> None:
    params = named(**MODEL)
    first, others = list(params.items())[:3], list(params.items())[3:]
    groups = [{"params": first, "lr": 0.5}, {"params": others, "state_bits": 32}]
    optimizer = opt8bit.MuonAdamW8bit(groups, adamw_lr=2.0)
    assert [(group["use_muon"], group["lr"], group["state_bits"]) for group in optimizer.param_groups] == [
        (False, 0.5, 8),
        (True, 0.5, 8),
        (True, 1e-3, 32),
        (False, 2.0, 32),
    ]
    assert set(by_muon(optimizer)) == OF_MUON


@pytest.mark.parametrize("carry", [lambda optimizer: optimizer, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_group_that_is_added_later_is_divided_alike(carry: Callable[[Any], Any]) -> None:
    optimizer = carry(opt8bit.MuonAdamW8bit(named(a=(64, 64)).items(), adamw_lr=2.0))
    optimizer.add_param_group({"params": list(named(b=(64, 64), embed=(64, 64)).items())})
    assert [(group["use_muon"], group["lr"]) for group in optimizer.param_groups] == [
        (True, 1e-3),
        (True, 1e-3),
        (False, 2.0),
    ]


def test_of_a_group_that_is_refused_nothing_is_added() -> None:
    optimizer = opt8bit.MuonAdamW8bit(named(a=(64, 64)).items())
    bad = [("b", nn.Parameter(torch.zeros(8, 8))), ("bias", nn.Parameter(torch.zeros(8).to(torch.float8_e4m3fn)))]
    with pytest.raises(TypeError, match="parameters must be one of"):
        optimizer.add_param_group({"params": bad})
    assert len(optimizer.param_groups) == 1


def twins(kind: str, params: ByName, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of one rule alone, with the hyper-parameters that MuonAdamW8bit has by default."""
    if kind == "muon":
        return opt8bit.Muon8bit(params.values(), adjust_lr_fn="match_rms_adamw", **options)
    return opt8bit.AdamW8bit(params.values(), weight_decay=0.1, **options)


@pytest.mark.parametrize("bits", [8, 32])
def test_each_group_is_stepped_as_by_its_own_optimizer(
    bits: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in one optimizer of both rules."""
    monkeypatch.setenv("OPT8BIT_BACKEND", backend)
    params = {name: param for name, param in named(**MODEL).items() if param.dim() < 3}
    alone = copy.deepcopy(params)
    optimizer = opt8bit.MuonAdamW8bit(params.items(), state_bits=bits)
    parts = {
        kind: {name: param for name, param in alone.items() if (name in OF_MUON) == (kind == "muon")}
        for kind in ("muon", "adamw")
    }
    others = [twins(kind, part, state_bits=bits) for kind, part in parts.items()]
    for seed in range(4):
        step(optimizer, params, seed)
        for name, param in alone.items():
            grad = params[name].grad
            assert grad is not None
            param.grad = grad.clone()
        for other in others:
            other.step()
    states = {param: other.state[param] for other in others for param in other.state}
    for name, param in params.items():
        assert torch.equal(param, alone[name]), name
        assert all(torch.equal(value, states[alone[name]][key]) for key, value in optimizer.state[param].items()), name


def test_adamw_keeps_its_kernels_beside_muon(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes Muon's steps, and nothing else."""
    monkeypatch.setenv("OPT8BIT_BACKEND", kernels)
    stepped: list[str] = []
    original = native.step_batch

    def step_batch(each: BatchStep, *rest: Any) -> None:
        stepped.append(each.batch.rule.name)
        original(each, *rest)

    monkeypatch.setattr(native, "step_batch", step_batch)
    params = named(**MODEL)
    step(opt8bit.MuonAdamW8bit(params.items()), params, 0)
    assert set(stepped) == {"muon_of_batches"}


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (PANEL * 2 + 10, 64)])
def test_matrices_of_a_batch_are_iterated_each_for_itself(shape: tuple[int, int]) -> None:
    """To the rounding of bfloat16, whose products may be added in another order."""
    batch = torch.stack([gradients(1, shape, seed)[0] for seed in range(3)])
    expected = torch.stack([orthogonalized(matrix, COEFFICIENTS, 5, 1e-7) for matrix in batch])
    torch.testing.assert_close(orthogonalized(batch, COEFFICIENTS, 5, 1e-7), expected, rtol=0.02, atol=4e-3)


HYPER: dict[str, Any] = {
    **{"step": 1, "lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1, "ns_coefficients": COEFFICIENTS},
    **{"ns_steps": 5, "eps": 1e-7, "adjust_lr_fn": "match_rms_adamw", "maximize": False},
}


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    lr = 0.02 * 0.2 * 8  # of a matrix of up to 64 rows and columns
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=4e-3 * lr)
    assert torch.equal(found[1], expected[1])


def test_heads_are_matrices_of_their_own() -> None:
    param, grad, buffer = (gradients(1, (64, 48), seed)[0] for seed in range(3))
    parts = [muon(*each, **HYPER) for each in zip(*(x.chunk(4) for x in (param, grad, buffer)), strict=True)]
    expected = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    close(muon(param, grad, buffer, heads=4, **HYPER), expected)
    assert not torch.allclose(muon(param, grad, buffer, heads=1, **HYPER)[0], expected[0], atol=1e-3)


def test_experts_are_matrices_of_their_own() -> None:
    param, grad, buffer = (gradients(1, (3, 64, 48), seed)[0] for seed in range(3))
    parts = [muon(*each, **HYPER) for each in zip(param, grad, buffer, strict=True)]
    close(muon(param, grad, buffer, **HYPER), tuple(torch.stack(column) for column in zip(*parts, strict=True)))


def test_heads_are_given_by_patterns() -> None:
    params = named(q__weight=(64, 64), k__weight=(32, 64), o__weight=(64, 64))
    optimizer = opt8bit.MuonAdamW8bit(params.items(), heads={"q.*": 8, "k.*": 4})
    assert by_muon(optimizer) == {"q.weight": 8, "k.weight": 4, "o.weight": 1}
    step(optimizer, params, 0)
    grad, before = params["q.weight"].grad, named(q__weight=(64, 64))["q.weight"].detach()
    assert grad is not None
    expected, _ = muon(before, grad, torch.zeros(64, 64), heads=8, **{**HYPER, "lr": 1e-3})
    torch.testing.assert_close(params["q.weight"].detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offload", [True, "backward"])
def test_offloaded_steps_are_the_same(offload: Any) -> None:
    results = []
    for options in ({}, {"offload": offload}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        optimizer = opt8bit.MuonAdamW8bit(model, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
        results.append([*model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_checkpoints_go_on_bit_for_bit() -> None:
    params = named(**MODEL)
    optimizer = opt8bit.MuonAdamW8bit(params.items(), heads={"*q.weight": 4})
    for seed in range(2):
        step(optimizer, params, seed)
    others = copy.deepcopy(params)
    other = opt8bit.MuonAdamW8bit(others.items(), heads={"*q.weight": 4})
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    step(optimizer, params, 5)
    step(other, others, 5)
    assert all(torch.equal(param, others[name]) for name, param in params.items())


def test_a_state_dict_that_divides_parameters_otherwise_is_refused() -> None:
    """Here it would have Muon step a vector."""
    saved = opt8bit.MuonAdamW8bit(named(weight=(64, 64), bias=(64,)).items()).state_dict()
    optimizer = opt8bit.MuonAdamW8bit(named(bias=(64,), weight=(64, 64)).items())
    with pytest.raises(ValueError, match="parameter group 0: Muon takes matrices of real numbers"):
        optimizer.load_state_dict(saved)
    assert [group["use_muon"] for group in optimizer.param_groups] == [False, True]


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"muon": ["conv*"]}, r"muon must have patterns that fit names of parameters, got 'conv\*'"),
        ({"adamw": ["weight"]}, "adamw must have patterns that fit names of parameters, got 'weight'"),
        ({"heads": {"q": 2}}, "heads must have patterns that fit names of parameters that Muon steps, got 'q'"),
        ({"muon": "*"}, r"muon must be a list of patterns of names, got '\*'"),
        ({"muon": ["a"], "adamw": ["*"]}, "must not have patterns that fit the same parameter, got 'a'"),
        ({"heads": {"a": 2, "*": 4}}, r"heads must be one number for 'a', got \[2, 4\]"),
        ({"heads": {"a": 5}}, r"heads must divide the rows of a matrix, got 5 for a parameter of shape \(64, 32\)"),
        ({"heads": {"bias": 4}}, "heads must have patterns that fit names of parameters that Muon steps, got 'bias'"),
        ({"heads": 0}, "heads must be a positive integer, or such integers by patterns of names, got 0"),
        ({"heads": True}, "heads must be a positive integer, .* got True"),
        ({"heads": 1.5}, "heads must be a positive integer, .* got 1.5"),
        ({"heads": None}, "heads must be a positive integer, .* got None"),
        ({"heads": [4]}, r"heads must be a positive integer, .* got \[4\]"),
        ({"heads": {"a": "4"}}, "heads must be a positive integer, .* got {'a': '4'}"),
        ({"heads": 4, "use_muon": False}, "heads must be 1 where AdamW steps all parameters, got 4"),
        ({"muon": None}, "muon must be a list of patterns of names, got None"),
        ({"muon": 5}, "muon must be a list of patterns of names, got 5"),
        ({"adamw": [5]}, r"adamw must be a list of patterns of names, got \[5\]"),
        ({"muon": ["bias"]}, r"Muon takes matrices .* of shape \(32,\) and torch.float32"),
        ({"use_muon": "yes"}, "use_muon must be True or False, got 'yes'"),
        ({"adamw_lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"adamw_lr": -1.0, "use_muon": True, "muon": ["*"]}, "Invalid learning rate: -1.0"),
        ({"ns_steps": 100, "use_muon": False}, "ns_steps must be an integer from 0 to 99, got 100"),
        ({"lr": "a"}, "lr must be a finite number, got 'a'"),
        ({"momentum": None, "use_muon": False}, "momentum must be a finite number, got None"),
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"adjust_lr_fn": "other"}, "Adjust learning rate function other is not supported"),
        ({"fused": True}, "fused=True, but Muon's matrix products are torch's"),
    ],
)
def test_bad_arguments_are_refused(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opt8bit.MuonAdamW8bit(named(a=(64, 32), bias=(32,)).items(), **hyper)


def test_parameters_without_names_need_a_rule() -> None:
    matrix, vector = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match=r"chosen by their names: give a module.* of shape \(8, 8\) without a name"):
        opt8bit.MuonAdamW8bit([matrix, vector])
    optimizer = opt8bit.MuonAdamW8bit(
        [{"params": matrix, "use_muon": True}, {"params": [vector], "use_muon": False, "lr": 0.5}]
    )
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    with pytest.raises(ValueError, match="heads must be 1 in a group that AdamW steps, got 2"):
        optimizer.add_param_group({"params": [matrix], "use_muon": False, "heads": 2})
    with pytest.raises(ValueError, match="Some param names are missing"):
        opt8bit.MuonAdamW8bit([("a", matrix), vector])
    with pytest.raises(TypeError, match="an ordered collection, got a set"):
        optimizer.add_param_group({"params": {matrix}})
