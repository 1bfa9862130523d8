"""What goes from block to block besides the hidden states, in models made for the purpose."""

from collections import UserDict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from test_calls import WIDTH, Inner
from test_calls import Model as Plain
from torch import Tensor, nn
from toys import assert_same_changes, token_ids

from opt8bit import ptq
from opt8bit.ptq.model.passes import Call, ModelError
from opt8bit.ptq.model.recording import no_cache
from opt8bit.ptq.model.states import State, copied, hidden_in, is_cache, with_hidden

IDS = token_ids(6)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Block(Inner):
    """Adds two layers' outputs; what it is given besides the hidden states is the subclasses' business."""

    def __init__(self, number: int) -> None:
        super().__init__(2)
        self.number = number


class Model(nn.Module):
    """Calls its blocks as a subclass of it says in ``through``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, WIDTH)
        self.blocks: Any = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 96)

    def through(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.through(self.embedding(input_ids))))


def check(model: nn.Module, **options: Any) -> ptq.Result:
    """Both streams predict what the models predict."""
    result = ptq.compress(model, IDS, **{"bits": 2, "group_size": 8, "batch_size": 4, "held_out": IDS, **options})
    quality = result.quality
    assert quality is not None
    for of, found in ((model, quality.perplexity), (result.compressed_model(), quality.perplexity_compressed)):
        with torch.no_grad():
            losses = nn.functional.cross_entropy(of(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        assert found == pytest.approx(float(losses.exp()), rel=1e-5)
    assert quality.kl_divergence > 1e-8
    return result


class Keys(UserDict[str, Any]):
    """A dictionary that is none, as Gemma 4's."""


class Sharing(Model):
    """The first block leaves keys for the others in an object that all are called with; so do the others, there."""

    class Block(Block):
        def forward(self, hidden: Tensor, keys: Any) -> Tensor:  # type: ignore[override]
            if self.number == 0:
                keys["first"] = self.norm(hidden)
                keys["seen"] = []
            keys["seen"].append(hidden.mean())  # whoever comes again sees twice as many
            return super().forward(hidden + keys["first"] * len(keys["seen"]))

    def __init__(self, kind: type = dict) -> None:
        super().__init__(*(self.Block(i) for i in range(3)))
        self.kind = kind

    def through(self, hidden: Tensor) -> Tensor:
        keys = self.kind()
        for block in self.blocks:
            hidden = block(hidden, keys=keys)
        return hidden


@pytest.mark.parametrize("kind", [dict, Keys])
@pytest.mark.parametrize("correct", ["none", "local"])
def test_what_blocks_share_is_each_streams_and_each_passs_own(kind: type, correct: str) -> None:
    model = Sharing(kind)
    found = [check(model, bits=bits, bias_correction=correct).quality for bits in (2, 8)]
    assert found[0] is not None and found[1] is not None and found[0].perplexity == found[1].perplexity


def test_an_unfinished_run_of_blocks_that_share_starts_again(tmp_path: Path) -> None:
    model = Sharing()
    expected = check(model)

    def stop(report: Any, total: int) -> None:
        if report.name.startswith("blocks.2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(model, work=tmp_path / "work", see=stop)
    found = check(model, work=tmp_path / "work")
    assert found.quality == expected.quality
    assert_same_changes(found, expected)


class Cache:
    """Keys of all calls so far."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def update(self, number: int, keys: Tensor) -> Tensor:
        self.keys[number] = torch.cat([self.keys[number], keys], 1) if number in self.keys else keys
        return self.keys[number]


class Caching(Model):
    """Has a cache whatever ``use_cache`` says; ``shares`` has later blocks read the first one's keys in it."""

    class Block(Block):
        shares = False

        def forward(self, hidden: Tensor, past: Cache | None = None) -> Tensor:
            keys = self.norm(hidden)
            if past is not None:
                keys = past.update(self.number, keys)
                if self.shares:
                    keys = past.keys[0]
            return super().forward(hidden + keys.sum(1, keepdim=True))

    def __init__(self, shares: bool) -> None:
        super().__init__(*(self.Block(i) for i in range(3)))
        for block in self.blocks:
            block.shares = shares

    def through(self, hidden: Tensor) -> Tensor:
        past = Cache()
        for block in self.blocks:
            hidden = block(hidden, past)
        return hidden


@pytest.mark.parametrize("shares", [False, True])
def test_no_pass_sees_the_keys_of_another_one(shares: bool) -> None:
    check(Caching(shares), bias_correction="local")


@torch.no_grad()
def test_a_call_can_be_repeated_while_the_streams_own_pass_goes_on() -> None:
    class Counting(Inner):
        def forward(self, hidden: Tensor, seen: list[Tensor]) -> Tensor:  # type: ignore[override]
            seen.append(hidden)
            return super().forward(hidden * len(seen))

    block, recorded, state = Counting(), [torch.ones(1)], State()
    call = Call(torch.randn(1, 2, WIDTH), (recorded,), {}, state=state)
    repeated = call.repeatable()
    expected = Inner.forward(block, 2 * call.hidden)
    later = call._replace(later=frozenset([id(recorded)]))
    assert torch.equal(repeated.of(block), expected) and torch.equal(later.through(block), expected)
    assert torch.equal(repeated.of(block), expected)
    assert torch.equal(call.of(block), Inner.forward(block, 3 * call.hidden))
    assert torch.equal(call.repeatable().of(block), call.of(block)) and len(recorded) == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SimpleNamespace(use_cache=True), {"use_cache": False}),
        (SimpleNamespace(text_config=SimpleNamespace(use_cache=True)), {"use_cache": False}),
        (SimpleNamespace(text_config=SimpleNamespace()), {}),
    ],
)
def test_any_part_of_a_configuration_may_switch_a_cache(config: Any, expected: dict[str, Any]) -> None:
    class Open(nn.Module):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> None: ...

    class Closed(nn.Module):
        def forward(self, input_ids: Tensor) -> None: ...

    class Named(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> None: ...

    for model_class, options in ((Open, expected), (Closed, {}), (Named, {"use_cache": False})):
        model: Any = model_class()
        model.config = config
        assert no_cache(model) == options


class Pair(NamedTuple):
    hidden: Tensor
    bias: Tensor


@dataclass
class Output:
    hidden: Tensor
    bias: Tensor


MAKE: dict[str, Any] = {
    "tuple": lambda hidden, bias: (hidden, None, bias),
    "list": lambda hidden, bias: [hidden, bias],
    "named": Pair,
    "dict": lambda hidden, bias: {"hidden": hidden, "bias": bias},
    "dataclass": Output,
}
READ: dict[str, Any] = {
    "tuple": lambda output: (output[0], output[2]),
    "list": lambda output: (output[0], output[1]),
    "named": lambda output: output,
    "dict": lambda output: (output["hidden"], output["bias"]),
    "dataclass": lambda output: (output.hidden, output.bias),
}


class Handing(Model):
    """Each block returns a bias for the next one; it has the hidden states as a keyword of a name of its own."""

    class Block(Block):
        kind = "tuple"

        def forward(self, *, mask: Tensor, stream: Tensor, bias: Any = None) -> Any:  # type: ignore[override]
            bias = self.norm(stream) if bias is None else bias + self.norm(stream)
            return MAKE[self.kind](super().forward(stream + mask * bias), bias)

    def __init__(self, kind: str) -> None:
        super().__init__(*(self.Block(i) for i in range(3)))
        for block in self.blocks:
            block.kind = kind
        self.kind = kind

    def through(self, hidden: Tensor) -> Tensor:
        bias, mask = None, hidden.new_ones(hidden.shape[1], 1)
        for block in self.blocks:
            hidden, bias = READ[self.kind](block(mask=mask, stream=hidden, bias=bias))
        return hidden


@pytest.mark.parametrize("kind", MAKE)
def test_what_blocks_return_besides_the_hidden_states_is_handed_on(kind: str) -> None:
    check(Handing(kind))


@pytest.mark.parametrize("kind", MAKE)
def test_hidden_states_are_the_first_of_what_a_block_returns(kind: str) -> None:
    hidden, bias, other = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)
    output = MAKE[kind](hidden, bias)
    assert hidden_in(output) is hidden
    changed = with_hidden(output, other)
    assert hidden_in(output) is hidden and hidden_in(changed) is other and type(changed) is type(output)
    assert READ[kind](changed)[1] is bias


class Overwriting(Model):
    class Block(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden.mul_(1.5))

    def __init__(self) -> None:
        super().__init__(*(self.Block(i) for i in range(2)))

    def through(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_a_block_that_overwrites_its_hidden_states_overwrites_no_others() -> None:
    check(Overwriting(), bias_correction="local")


class Remembering(Overwriting):
    """Blocks keep the last output in an attribute; ``across`` has them read it after a layer has run."""

    class Block(Block):  # pyright: ignore[reportIncompatibleVariableOverride]
        across = False
        last: Tensor | None = None

        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.last = None

        def forward(self, hidden: Tensor) -> Tensor:
            if self.last is not None:
                hidden = hidden + self.last
            if self.across:
                self.last = hidden
                return super().forward(hidden) + self.last
            hidden = super().forward(hidden)
            self.last = hidden
            return hidden

    def __init__(self, across: bool = False) -> None:
        super().__init__()
        for block in self.blocks:
            block.across = across

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        for block in self.blocks:
            block.last = None
        return super().forward(input_ids)


def test_what_modules_remember_of_a_pass_is_forgotten() -> None:
    check(Remembering())


def test_what_modules_keep_for_later_in_a_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^blocks\.0 keeps what it needs in one pass in attributes of its modules: "):
        check(Remembering(across=True))


class Reading(Overwriting):
    """The model tells its blocks what it has made of the hidden states."""

    class Block(Block):  # pyright: ignore[reportIncompatibleVariableOverride]
        def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(hidden * scale)

    def through(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, hidden.mean((1, 2), keepdim=True))
        return hidden


class Looping(Overwriting):
    def through(self, hidden: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            hidden = block(hidden)
        return hidden


class Collecting(Overwriting):
    """The logits are made of what every block puts out."""

    def through(self, hidden: Tensor) -> Tensor:
        total = hidden
        for block in self.blocks:
            hidden = block(hidden.clone())
            total = total + hidden
        return total


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (Reading, r"^blocks\.1 gets argument 1 from the model, which depends on the blocks before it$"),
        (Looping, r"^Looping calls its block 0 where its block 2 is expected$"),
        (Collecting, r"^Collecting makes its logits of more than what its last block puts out$"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_rounded(
    model_class: type[nn.Module], message: str
) -> None:
    seen: list[object] = []
    with pytest.raises(ValueError, match=message):
        check(model_class(), see=lambda *row: seen.append(row))
    assert not seen


@pytest.mark.parametrize("error", [RuntimeError("too long"), ValueError("too long"), KeyError("too long")])
@pytest.mark.parametrize("length", [1, 20])
def test_an_exception_of_the_models_own_is_reported_as_that(error: Exception, length: int) -> None:
    """In the first pass, of a few tokens, as well as in later ones."""

    class Failing(Inner):
        def forward(self, hidden: Tensor) -> Tensor:
            if hidden.shape[1] >= length:
                raise error
            return super().forward(hidden)

    with pytest.raises(ModelError) as caught:
        ptq.compress(Plain(Inner(), Failing()), IDS, bits=2, group_size=8)
    assert str(caught.value) == f"the model's block blocks.1 raised {type(error).__name__}: {error}"
    assert caught.value.__cause__ is error


def test_an_exception_outside_of_blocks_is_not_said_to_be_one_of_theirs() -> None:
    class Failing(Plain):
        def between(self, hidden: Tensor) -> Tensor:
            raise KeyError("scale")

    with pytest.raises(ModelError, match=r"^the model raised KeyError: 'scale'$"):
        ptq.compress(Failing(Inner(), Inner()), IDS, bits=2, group_size=8)


@dataclass
class Nested:
    parts: list[Any]
    mask: Tensor


def test_copies_share_tensors_and_nothing_that_can_be_changed() -> None:
    tensor, module = torch.ones(2), nn.Linear(1, 1)
    shared = [tensor]
    value = (Nested([shared, module], tensor), {"shared": shared, "pair": (tensor, 1)}, "text")
    found = copied(value, {})
    nested, table, _ = found
    assert nested is not value[0] and nested.mask is tensor and nested.parts[1] is module
    assert nested.parts[0] is table["shared"] and nested.parts[0] is not shared and nested.parts[0][0] is tensor
    assert table["pair"] is value[1]["pair"]  # nothing in it can be changed
    nested.parts.append(0)
    assert len(value[0].parts) == 2 and replace(value[0]).mask is tensor


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("anything", Cache(), True),
        ("past_key_values", ((torch.ones(1), torch.ones(1)),), True),
        ("cache_params", SimpleNamespace(), True),
        ("position_embeddings", (torch.ones(1), torch.ones(1)), False),
        ("keys", Keys(), False),
        ("use_cache", True, False),
        ("past_key_values", None, False),
    ],
)
def test_caches_are_told_by_class_and_by_name(name: str, value: Any, expected: bool) -> None:
    assert is_cache(name, value) == expected
