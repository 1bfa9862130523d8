"""Correction of models that something else has quantized, against the float models that they were made of."""

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toys import MODELS, Mlp, token_ids

from opt8bit import ptq
from opt8bit.ptq.pairs.choice import GROUPS, PASSES, groups_of
from opt8bit.quant import UniformGrid

ORDERS = ("local", "sequential")


def fake_quantized(model: nn.Module, bits: int = 2, dtype: torch.dtype | None = None) -> Any:
    """A copy whose matrices and filters are rounded to nearest, one scale for all of each."""
    result = copy.deepcopy(model)
    for param in result.parameters():
        if param.dim() > 1:
            rows = param.detach().flatten()[None]
            grid = UniformGrid(bits)
            param.data = grid.nearest(rows, grid.fit(rows)).view_as(param)
    return result if dtype is None else result.to(dtype)


class Cnn(nn.Module):
    """Convolutions of every kind, padded, grouped, strided and transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False),
        )
        self.line, self.volume = nn.Conv1d(6, 5, 3, padding=1), nn.Conv3d(1, 2, (1, 3, 2), bias=False)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        line = self.line(self.body(x).mean(-1).relu())
        return self.head(self.volume(line[:, None, None].relu()).mean((2, 3, 4)))


class Tokens(nn.Module):
    """Attention over tokens, with what is no linear layer of its own in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.block = nn.Embedding(20, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, ids: Tensor) -> tuple[str, Tensor]:
        return "logits", self.head(self.block(self.embedding(ids)))


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]  # by seed, of 8 samples


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


CASES = {
    "rows": Case(Mlp, normal(8, 6)),
    "tokens": Case(Mlp, lambda seed: (normal(8, 5, 6)(seed),)),
    "dictionary": Case(lambda: Mlp(bias=False), lambda seed: {"x": normal(8, 5, 2, 6)(seed)}),
    "images": Case(Cnn, normal(8, 3, 6, 6)),
}


class Watched(NamedTuple):
    args: tuple[Any, ...]
    output: Tensor


def watched(model: nn.Module, batch: Any) -> dict[str, Watched]:
    """What each module is called with, and what it puts out."""
    seen: dict[str, Watched] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: Watched(args, output)}), always_call=False
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        if isinstance(batch, dict):
            model(**batch)
        else:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    for handle in handles:
        handle.remove()
    return seen


def together(batches: list[Any]) -> Any:
    if isinstance(batches[0], dict):
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return (torch.cat([b[0] for b in batches]),) if isinstance(batches[0], tuple) else torch.cat(batches)


def mean_error(name: str, model: nn.Module, y: Tensor, y_hat: Tensor) -> float:
    module = model.get_submodule(name)
    axis = -1 if isinstance(module, nn.Linear) else 1
    return float((y - y_hat).detach().movedim(axis, -1).flatten(0, -2).mean(0).abs().max())


def of_layers(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_the_error_of_every_layer_is_centred(name: str, order: str, statistic: str) -> None:
    case = CASES[name]
    model, batches = case.model().double().eval(), [case.batch(seed) for seed in range(5)]
    quantized = fake_quantized(model)
    untouched = {key: value.clone() for key, value in quantized.state_dict().items()}
    correction = ptq.correct(quantized, model, batches, order=order, statistic=statistic, shrink=False)
    names = of_layers(model)
    assert sorted(module.name for module in correction.modules) == sorted(names) and not correction.skipped
    floats, others = watched(model, together(batches)), watched(quantized, together(batches))
    for each in names:
        y, y_hat = floats[each].output, others[each].output
        if order == "local":  # for the float model's inputs
            with torch.no_grad():
                y_hat = quantized.get_submodule(each)(*floats[each].args)
        axis = -1 if isinstance(model.get_submodule(each), nn.Linear) else 1
        error = (y - y_hat).movedim(axis, -1).flatten(0, -2)
        centre = error.mean(0) if statistic == "mean" else error.median(0).values
        assert centre.abs().max() < 1e-10 < error.abs().max()
    for key, value in untouched.items():
        assert key.endswith("bias") or torch.equal(quantized.state_dict()[key], value)
    assert {m.place for m in correction.modules} <= {"bias", "new bias"}


def test_samples_and_their_means_support_the_same_biases() -> None:
    """The shrunk biases of linear layers are those of the statistics that every token goes into."""
    model = Mlp().double()
    batches = [normal(8, 5, 6)(seed) for seed in range(4)]
    quantized = fake_quantized(model)
    y, y_hat = (network.first(torch.cat(batches)).detach() for network in (model, quantized))
    ptq.correct(quantized, model, batches, layers="first")
    expected = ptq.BiasCompensation(12, -1, dtype=torch.float64)
    expected.update(y, y_hat)
    rounded = fake_quantized(model)
    torch.testing.assert_close(quantized.first.bias - rounded.first.bias, expected.bias, check_dtype=False)
    assert expected.bias.abs().max() > 0


class RoundsInputs(nn.Linear):
    """A layer with dynamic quantization of its inputs, to so few levels that means do not pass through."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.round())


@pytest.mark.parametrize(("shape", "padding"), [((8, 5, 6), 0), ((8, 6), 0), ((4, 200, 6), 120)])
def test_layers_that_are_not_linear_see_everything(shape: tuple[int, ...], padding: int) -> None:
    """Padding at the start is the same in every token, so that its mean tells nothing."""
    model, batches = Mlp().double(), [normal(*shape)(seed) for seed in range(5)]
    batches[0][:, :padding] = 0
    quantized = copy.deepcopy(model)
    quantized.first = RoundsInputs(6, 12).double()
    quantized.first.load_state_dict(model.first.state_dict())
    ptq.correct(quantized, model, batches, layers=["first"], shrink=False)
    x = torch.cat(batches)
    assert mean_error("first", model, model.first(x), quantized.first(x)) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
def test_padding_does_not_count(order: str) -> None:
    model, ids = MODELS["llama"]().double(), token_ids()
    quantized = fake_quantized(model)
    mask = torch.ones_like(ids)
    mask[3:, 20:] = 0
    batches = [{"input_ids": ids[i : i + 5], "attention_mask": mask[i : i + 5]} for i in (0, 5)]
    ptq.correct(quantized, model, batches, layers="*.down_proj", order=order, shrink=False)
    whole = {"input_ids": ids, "attention_mask": mask}
    floats, others = watched(model, whole), watched(quantized, whole)
    name = "model.layers.1.mlp.down_proj"
    y_hat = others[name].output
    if order == "local":
        y_hat = quantized.get_submodule(name)(*floats[name].args).detach()
    error = floats[name].output - y_hat
    assert error[mask.bool()].mean(0).abs().max() < 1e-10 < error.flatten(0, 1).mean(0).abs().max()


def test_keys_are_left_as_they_are_unless_asked_for() -> None:
    model, ids = MODELS["llama"](), token_ids()
    quantized = fake_quantized(model)
    correction = ptq.correct(quantized, model, [ids[:5], ids[5:]])
    left = [name for name, why in correction.skipped.items() if why == "it is among those to leave"]
    assert left and all(name.endswith("k_proj") for name in left)
    assert quantized.model.layers[0].self_attn.k_proj.bias is None
    assert quantized.model.layers[0].self_attn.q_proj.bias is not None
    asked = ptq.correct(fake_quantized(model), model, [ids[:5], ids[5:]], leave=())
    assert any(module.name.endswith("k_proj") for module in asked.modules)


class NoPlace(nn.Module):
    """A layer of a class that has no bias, as a tool may have made it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Buffered(NoPlace):
    """The same with a place for a bias among the buffers."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, name: str = "bias") -> None:
        super().__init__(weight)
        self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.bias is None else super().forward(x) + self.bias


class Deaf(NoPlace):
    """A class whose bias is there and does nothing."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype))


class Raising(NoPlace):
    """A class that cannot do with a bias where it has an empty place for one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            raise NotImplementedError
        return super().forward(x)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (NoPlace, "BiasCompensation"),
        (Buffered, "new bias"),
        (Deaf, "BiasCompensation"),
        (Raising, "BiasCompensation"),
    ],
)
def test_a_bias_goes_where_it_is_added(kind: type[NoPlace], place: str, order: str) -> None:
    model, batches = Mlp(bias=False).double(), [normal(8, 5, 6)(seed) for seed in range(3)]

    def made() -> Any:
        result = fake_quantized(model)
        result.first = kind(result.first.weight.detach())
        return result

    quantized = made()
    correction = ptq.correct(quantized, model, batches, layers="first", order=order, shrink=False)
    assert [module.place for module in correction.modules] == [place]
    x = torch.cat(batches)
    assert mean_error("first", model, model.first(x), quantized.first(x)) < 1e-12
    behind = place == "BiasCompensation"
    assert ("first.bias" in dict(quantized.named_parameters())) == (kind is Deaf)  # buffers stay buffers
    assert ("first.bias_compensation.bias" in quantized.state_dict()) == behind
    assert ("first.bias_compensation" in dict(quantized.named_modules())) == behind
    y = quantized(x)
    saved = io.BytesIO()
    torch.save(quantized, saved)
    saved.seek(0)
    for other in (copy.deepcopy(quantized), torch.load(saved, weights_only=False)):
        assert torch.equal(other(x), y)
    loaded = made()
    ptq.prepare_corrected(loaded, quantized.state_dict())
    loaded.load_state_dict(quantized.state_dict())
    assert torch.equal(loaded(x), y)
    correction.undo()
    assert torch.equal(quantized(x), made()(x)) and quantized.state_dict().keys() == made().state_dict().keys()


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_and_the_models_output(order: str) -> None:
    """A block is corrected after the layers in it, and the model after its blocks."""
    model, ids = Tokens().double().eval(), torch.randint(20, (40, 7), generator=torch.Generator().manual_seed(0))
    quantized = fake_quantized(model)
    options: dict[str, Any] = {"order": order, "shrink": False, "element": 1}
    layers = (nn.TransformerEncoderLayer, "block.linear1", "")
    correction = ptq.correct(quantized, model, ids.split(8), layers=layers, **options)
    places = {module.name: module.place for module in correction.modules}
    assert places == {"block.linear1": "bias", "block": "BiasCompensation", "": "BiasCompensation"}
    kind, logits = quantized(ids)
    assert kind == "logits" and (model(ids)[1] - logits).mean((0, 1)).abs().max() < 1e-12
    loaded = fake_quantized(model)
    ptq.prepare_corrected(loaded, quantized.state_dict(), element=1)
    loaded.load_state_dict(quantized.state_dict())
    assert torch.equal(loaded(ids)[1], logits)
    with pytest.raises(ValueError, match=r"^the model returns a tuple of 2: say by element= which of it is meant"):
        ptq.correct(fake_quantized(model), model, ids.split(8), layers="", order=order)


def test_modules_that_are_never_called_are_named() -> None:
    model, ids = Tokens().eval(), torch.randint(20, (40, 7), generator=torch.Generator().manual_seed(0))
    quantized = fake_quantized(model)
    correction = ptq.correct(quantized, model, ids.split(8), layers=["*.out_proj", "head"])
    assert correction.skipped == {"block.self_attn.out_proj": "it is never called"}


def of_first(model: nn.Module) -> list[int]:
    """The sizes of what the first layer will put out, call by call."""
    sizes: list[int] = []
    first = next(module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    return sizes


def test_one_pass_of_the_float_model_says_local_errors() -> None:
    """The quantized layers see means alone: one row a sample, and one image for several."""
    for make, batch, most in ((Mlp, normal(32, 20, 6), 1 / 20), (Cnn, normal(32, 3, 6, 6), 1 / 16)):
        model = make().double().eval()
        quantized = fake_quantized(model)
        rows, rows_hat = of_first(model), of_first(quantized)
        ptq.correct(quantized, model, [batch(seed) for seed in range(8)])
        assert sum(rows_hat) <= 1.6 * most * sum(rows)  # and the trials on the first batch


def test_a_few_tokens_tell_what_a_layer_is() -> None:
    model, batches = Mlp().double(), [normal(4, 640, 6)(seed) for seed in range(8)]
    quantized = fake_quantized(model)
    tokens, tokens_hat = of_first(model), of_first(quantized)
    ptq.correct(quantized, model, batches)
    assert sum(tokens_hat) < 0.02 * sum(tokens)


def test_sequential_runs_each_model_once() -> None:
    model, batches = Mlp().double(), [normal(8, 6)(seed) for seed in range(6)]
    quantized = fake_quantized(model)
    calls, calls_hat = of_first(model), of_first(quantized)
    ptq.correct(quantized, model, batches, order="sequential")
    assert len(calls) == 6 and len(calls_hat) == 6 + 2  # and the trial of its bias


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_that_was_not_quantized_has_no_error_of_its_own(order: str) -> None:
    """In sequence it has one, that of its inputs. What a hook makes of its output is its own."""
    model, batches = Mlp().double(), [normal(8, 20, 6)(seed) for seed in range(6)]
    quantized = fake_quantized(model)
    quantized.second.load_state_dict(model.second.state_dict())
    correction = ptq.correct(quantized, model, batches, order=order)
    corrected = {module.name for module in correction.modules}
    assert corrected == ({"first"} if order == "local" else {"first", "second"})
    assert order == "sequential" or "it was not quantized" in correction.skipped["second"]
    correction.undo()
    quantized.second.register_forward_hook(lambda module, args, output: output + 0.5)
    again = ptq.correct(quantized, model, batches, order=order)
    assert {module.name for module in again.modules} == {"first", "second"}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.layer(x).relu()))


def test_a_layer_that_is_called_twice() -> None:
    """Locally both calls count; in sequence the first one does, and the second one is corrected by that."""
    model, batches = Twice().double(), [normal(8, 6)(seed) for seed in range(6)]
    x = torch.cat(batches)
    local, sequential = fake_quantized(model), fake_quantized(model)
    ptq.correct(local, model, batches, shrink=False)
    inputs = torch.cat([x, model.layer(x).relu()])
    assert mean_error("layer", model, model.layer(inputs), local.layer(inputs)) < 1e-12
    ptq.correct(sequential, model, batches, shrink=False, order="sequential")
    assert mean_error("layer", model, model.layer(x), sequential.layer(x)) < 1e-12
    assert (model(x) - sequential(x)).mean(0).abs().max() < 1e-12


# Choice on held-out data.


def classifier(seed: int) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 4))
    data = normal(160, 6)(seed).float()
    return model, fake_quantized(model), list(data[:16].split(8)), list(data[16:].split(16))


def divergence(model: nn.Module, quantized: nn.Module, batches: list[Tensor]) -> float:
    x = torch.cat(batches)
    with torch.no_grad():
        p, q = (network(x).log_softmax(-1) for network in (model, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("order", ORDERS)
def test_a_choice_is_never_worse_on_what_was_held_out(order: str) -> None:
    """With so little calibration that biases do harm, some of them."""
    dropped = 0
    for seed in range(12):
        model, quantized, calibration, held_out = classifier(seed)
        before = divergence(model, quantized, held_out)
        correction = ptq.correct(quantized, model, calibration, order=order, shrink=False, held_out=held_out)
        chosen = correction.held_out
        assert chosen is not None and chosen.passes <= PASSES
        after = divergence(model, quantized, held_out)
        assert after <= before + 1e-9
        assert (chosen.before, chosen.after) == (pytest.approx(before, rel=1e-4), pytest.approx(after, rel=1e-4))
        kept = {module.name for module in correction.modules if module.is_kept}
        assert kept == {name for group in chosen.kept for name in group}
        for module in correction.modules:  # what is dropped is as it was
            same = torch.equal(quantized.get_submodule(module.name).bias, model.get_submodule(module.name).bias)
            assert same != module.is_kept
        dropped += bool(chosen.dropped)
    assert dropped


def test_a_choice_by_another_loss() -> None:
    model, quantized, calibration, held_out = classifier(0)
    correction = ptq.correct(quantized, model, calibration, held_out=held_out, loss="mse")
    with torch.no_grad():
        error = float((model(torch.cat(held_out)) - quantized(torch.cat(held_out))).square().mean())
    assert correction.held_out is not None and correction.held_out.after == pytest.approx(error, rel=1e-4)
    own = ptq.correct(
        fake_quantized(model), model, calibration, held_out=held_out, loss=lambda a, b: (a - b).abs().max()
    )
    assert own.held_out is not None and own.held_out.after <= own.held_out.before


def flat(groups: list[list[str]]) -> list[str]:
    return [name for group in groups for name in group]


def test_groups_are_kinds_and_then_runs_of_neighbours() -> None:
    names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("q", "v", "down")] + ["head"]
    groups = groups_of(names)
    assert len(groups) == 13 and sorted(flat(groups)) == sorted(names)
    assert ["layers.0.q", "layers.1.q", "layers.2.q"] in groups and ["head"] in groups
    words = [f"layer_{'a' * i}" for i in range(50)]
    assert flat(groups_of(words)) == words and len(groups_of(words)) == GROUPS
    assert groups_of(["a"]) == [["a"]]


# What is refused.


def pair() -> tuple[Any, Any, list[Tensor]]:
    model = Mlp()
    return model, fake_quantized(model), [normal(8, 5, 6)(seed).float() for seed in range(4)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("order", ORDERS)
def test_modules_that_do_not_match_are_listed_and_refused_or_skipped(order: str) -> None:
    model, quantized, batches = pair()
    quantized.second = nn.Linear(12, 5)
    model.third = nn.Linear(2, 2)
    before = state(quantized)
    listed = r"modules do not match.*: second \(its weight has shape \(5, 12\).*; third \(Mlp has no such module\)"
    with pytest.raises(ValueError, match=listed):
        ptq.correct(quantized, model, batches, order=order)
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())
    correction = ptq.correct(quantized, model, batches, order=order, unmatched="skip")
    assert correction.skipped.keys() == {"second", "third"} and [m.name for m in correction.modules] == ["first"]


@pytest.mark.parametrize("order", ORDERS)
def test_outputs_of_other_shapes_are_found_when_they_are_there(order: str) -> None:
    for width in (12, 3):
        model, quantized, batches = pair()
        quantized.second = NoPlace(torch.randn(5, 12))
        with pytest.raises(ValueError, match=r"modules do not match.*: second \(it"):
            ptq.correct(quantized, model, batches[:width], order=order)
        correction = ptq.correct(quantized, model, batches, order=order, unmatched="skip")
        assert correction.skipped.keys() == {"second"}


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("which", ["float", "quantized"])
def test_an_output_that_is_not_finite_is_named(which: str, order: str, statistic: str) -> None:
    model, quantized, batches = pair()
    (model if which == "float" else quantized).second.bias.data[1] = torch.nan
    before = state(quantized)
    with pytest.raises(ValueError, match=f"^second: .*{which}.output must be finite, got nan at"):
        ptq.correct(quantized, model, batches, order=order, statistic=statistic)
    assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in state(quantized).items())


@pytest.mark.parametrize(("which", "value"), [("float", torch.nan), ("quantized", 1e32)])
def test_an_output_that_is_not_finite_late_is_named(which: str, value: float) -> None:
    """Where the layer was found to be affine on the first batch, and sees only means."""
    model, quantized, batches = pair()
    quantized.first.weight.data *= 1e10
    batches[-1][3, 2] = value
    with pytest.raises(ValueError, match=f"^first: the {which} output must be finite, got .* at"):
        ptq.correct(quantized, model, batches, layers="first")


def test_what_is_corrected_already_is_refused() -> None:
    model, quantized, batches = pair()
    correction = ptq.correct(quantized, model, batches, layers=Mlp)
    assert [module.place for module in correction.modules] == ["BiasCompensation"]
    with pytest.raises(ValueError, match="quantized is corrected already"):
        ptq.correct(quantized, model, batches)
    correction.undo()
    again = ptq.correct(quantized, model, batches, shrink=False)
    twice = ptq.correct(quantized, model, batches, shrink=False)  # biases in biases cannot be told, and do no harm
    assert all(module.norm < 1e-5 * first.norm for module, first in zip(twice.modules, again.modules, strict=False))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "joint"}, ValueError, "order must be one of local, sequential, got 'joint'"),
        ({"statistic": "mode"}, ValueError, "statistic must be one of mean, median, got 'mode'"),
        ({"unmatched": "ignore"}, ValueError, "unmatched must be one of refuse, skip, got 'ignore'"),
        ({"loss": "accuracy"}, ValueError, "loss must be one of kl, mse, got 'accuracy'"),
        ({"channel_axis": 1}, ValueError, "channel_axis must be negative, counted from the back, got 1"),
        ({"layers": "*.q_proj"}, ValueError, r"layers must select modules of Mlp, '\*.q_proj' selects none"),
        ({"layers": nn.Conv2d}, ValueError, "layers must select modules of Mlp, Conv2d selects none"),
        ({"leave": "*"}, ValueError, r"no module is left to correct: first \(it is among those to leave\)"),
        ({"held_out": []}, ValueError, "held_out must hold at least one batch"),
        ({"calibration": []}, ValueError, "calibration must hold at least one batch"),
        ({"calibration": torch.zeros(2, 6)}, TypeError, "calibration must be an iterable of batches, got Tensor"),
        ({"calibration": ["a text"]}, TypeError, "calibration must hold tensors, tuples or dictionaries, got str"),
        ({"reference": None}, TypeError, "reference must be an nn.Module, got NoneType"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, quantized, batches = pair()
    arguments = {"quantized": quantized, "reference": model, "calibration": batches, **options}
    with pytest.raises(error, match=message):
        ptq.correct(**arguments)


def test_models_that_cannot_be_compared_are_refused() -> None:
    model, quantized, batches = pair()
    with pytest.raises(ValueError, match="quantized and reference must be two models"):
        ptq.correct(model, model, batches)
    with pytest.raises(ValueError, match="reference must be in memory, got parameters on the meta device"):
        ptq.correct(quantized, copy.deepcopy(model).to("meta"), batches)
    quantized.first = model.first
    correction = ptq.correct(quantized, model, batches)
    assert correction.skipped["first"] == "it is one module in both models"


def test_passes_that_do_not_meet_are_refused_in_sequence() -> None:
    class Choosy(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.mean() > 0 else self.second(x.repeat(1, 1, 2))

    model, batches = Choosy(), [normal(8, 5, 6)(0).float(), -normal(8, 5, 6)(0).float()]
    with pytest.raises(ValueError, match="do not meet here: use order='local'"):
        ptq.correct(fake_quantized(model), model, batches, order="sequential")
    assert ptq.correct(fake_quantized(model), model, batches).modules


@pytest.mark.parametrize("order", ORDERS)
def test_a_quantized_model_of_another_dtype(order: str) -> None:
    model, batches = Mlp(), [normal(16, 5, 6)(seed).float() for seed in range(4)]
    quantized, exact = fake_quantized(model, dtype=torch.bfloat16), fake_quantized(model)
    ptq.correct(quantized, model, batches, order=order, shrink=False)
    ptq.correct(exact, model, batches, order=order, shrink=False)
    assert quantized.first.bias.dtype == torch.bfloat16
    for name in ("first", "second"):
        biases = (network.get_submodule(name).bias.detach().float() for network in (quantized, exact))
        torch.testing.assert_close(*biases, rtol=0.02, atol=0.02)
