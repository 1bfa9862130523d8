import numpy
import pytest
import torch

from opt8bit import AdamW8bit
from opt8bit.backends import Description, description

TENSORS = [
    torch.zeros(()),
    torch.zeros(0, 5),
    torch.zeros(3, 4, dtype=torch.bfloat16),
    torch.zeros(3, 4).t(),
    torch.zeros(6)[2:5],
    torch.zeros(1, 3).expand(4, 3),
    torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.empty(2, 3, device="meta"),
]


def test_torch_is_asked_where_it_can_be(kernels: str) -> None:
    """This torch exports the functions, so the fast way must be the one that is taken and tested."""
    assert description._torch_functions() is not None


def test_a_description_says_what_python_says() -> None:
    rows = Description(TENSORS).rows
    for row, tensor in zip(rows, TENSORS, strict=True):
        dim = tensor.dim()
        assert (row[3], tuple(row[4 : 4 + dim]), tuple(row[8 : 8 + dim])) == (dim, tensor.shape, tensor.stride())


@pytest.mark.parametrize("in_python", [False, True])
def test_tensors_that_differ_are_described_differently(monkeypatch: pytest.MonkeyPatch, in_python: bool) -> None:
    if in_python:
        monkeypatch.setattr(description, "_torch_functions", lambda: None)
    rows = Description(TENSORS).rows
    assert len({tuple(row) for row in rows}) == len(TENSORS)
    assert numpy.array_equal(rows, Description(TENSORS).rows)


@pytest.mark.parametrize("in_python", [False, True])
def test_what_is_not_strided_or_too_deep_is_not_described(monkeypatch: pytest.MonkeyPatch, in_python: bool) -> None:
    if in_python:
        monkeypatch.setattr(description, "_torch_functions", lambda: None)
    description_of_two = Description([torch.eye(3), torch.eye(3).to_sparse()])
    assert (description_of_two.rows[1] == -1).all() and (description_of_two.rows[0] != -1).any()
    for other in (torch.eye(3).to_sparse(), torch.zeros(1, 1, 1)):
        assert Description([torch.eye(3)]).addresses([other]) is None


@pytest.mark.parametrize("in_python", [False, True])
def test_addresses_of_many_tensors(monkeypatch: pytest.MonkeyPatch, in_python: bool) -> None:
    if in_python:
        monkeypatch.setattr(description, "_torch_functions", lambda: None)
    tensors = list(torch.zeros(5000, 3).unbind())
    described = Description(tensors)
    found = described.addresses(tensors)
    assert found is not None and found.tolist() == [*(tensor.data_ptr() for tensor in tensors), 0]
    assert described.addresses(tensors[1:]) is None
    for other in (torch.zeros(4), torch.zeros(3).bfloat16(), torch.zeros(6)[::2], torch.zeros(1, 3)):
        assert described.addresses([*tensors[:-1], other]) is None


def test_a_step_without_torchs_functions_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that does not export them."""
    results = []
    for functions in (description._torch_functions(), None):
        monkeypatch.setattr(description, "_torch_functions", lambda functions=functions: functions)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((70, 100), (30,), (64, 3, 8, 8))]
        optimizer = AdamW8bit(params)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
