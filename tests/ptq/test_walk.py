from typing import Any

import pytest
import torch
from torch import nn

from opt8bit.ptq.model.walk import halting, walks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


@torch.no_grad()
def test_passes_stand_before_a_layer_together_and_see_what_it_has_become() -> None:
    model: Any = network()
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    with walks([lambda x=x: model(x) for x in batches]) as passes, halting([model[0], model[2]]):
        for walk, x in zip(passes, batches, strict=True):
            assert walk.advance() is x
        model[0].weight.zero_()
        for walk in passes:
            x = walk.advance()
            assert torch.equal(x, model[0].bias.tanh().expand_as(x))
        model[2].weight.zero_()
        outputs = [walk.finish() for walk in passes]
    for x, output in zip(batches, outputs, strict=True):
        assert torch.equal(output, model(x))


@torch.no_grad()
def test_a_layer_whose_output_is_there_does_not_compute_it() -> None:
    model, seen = network(), []
    x, answer = torch.randn(3, 4), torch.randn(3, 4)
    with walks([lambda: model(x)] * 2) as passes, halting([model[0], model[2]]):
        for walk in passes:
            walk.advance()
            walk.advance()
        model[2].register_forward_hook(lambda module, args, output: seen.append(output))  # it is called already
        passes[0].answer(answer)
        outputs = [walk.finish() for walk in passes]
    assert seen[0] is answer
    assert torch.equal(outputs[0], model[3:](answer))
    assert torch.equal(outputs[1], model(x))


@torch.no_grad()
def test_an_answer_is_to_one_layer() -> None:
    model, answer = network(), torch.randn(3, 4)
    with walks([lambda: model(torch.randn(3, 4))]) as passes, halting([model[0], model[2]]):
        passes[0].advance()
        passes[0].answer(answer)
        assert torch.equal(passes[0].advance(), answer.tanh())
        assert torch.equal(passes[0].finish(), model[1:](answer))


@torch.no_grad()
def test_errors_arrive_where_the_pass_is_waited_for_and_layers_are_as_before() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with walks([lambda: model(torch.randn(3, 5))]) as passes, halting([model[2]]):
            passes[0].advance()
    assert "forward" not in vars(model[2]) and not model[2]._forward_pre_hooks
    model(torch.randn(3, 4))


@torch.no_grad()
def test_a_pass_that_takes_another_way_is_noticed() -> None:
    model = network()
    with walks([lambda: model(torch.randn(1, 4))] * 2) as passes, halting([model[0]]):
        passes[0].advance()
        with pytest.raises(RuntimeError, match="a layer was not reached"):
            passes[0].advance()
        with pytest.raises(RuntimeError, match="a layer was reached again"):
            passes[1].finish()


@torch.no_grad()
def test_a_pass_can_be_left_where_it_stands() -> None:
    model, ended = network(), []

    def forward() -> torch.Tensor:
        try:
            return model(torch.randn(1, 4))
        finally:
            ended.append(True)

    with walks([forward]) as passes, halting([model[2]]):
        passes[0].advance()
        assert not ended
    assert ended == [True]
