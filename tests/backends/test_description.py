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
WAYS = {  # what cannot be had: nothing; where an object keeps its tensor; torch's functions
    "objects": (),
    "handles": ("_offset_of_pointer",),
    "python": ("_torch_functions",),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in WAYS[request.param]:
        monkeypatch.setattr(description, name, lambda: None)
    return request.param


def test_torch_is_asked_where_it_can_be(kernels: str) -> None:
    """This torch exports the functions, so the fast way must be the one that is taken and tested."""
    assert description._torch_functions() is not None
    assert description._offset_of_pointer() is not None


def test_a_description_says_what_python_says() -> None:
    rows = Description(TENSORS).rows
    for row, tensor in zip(rows, TENSORS, strict=True):
        dim = tensor.dim()
        assert (row[4], tuple(row[5 : 5 + dim]), tuple(row[9 : 9 + dim])) == (dim, tensor.shape, tensor.stride())


def test_tensors_that_differ_are_described_differently(way: str) -> None:
    rows = Description(TENSORS).rows
    assert len({tuple(row) for row in rows}) == len(TENSORS)
    assert numpy.array_equal(rows, Description(TENSORS).rows)


def test_what_is_not_strided_or_too_deep_is_not_described(way: str) -> None:
    description_of_two = Description([torch.eye(3), torch.eye(3).to_sparse()])
    assert (description_of_two.rows[1] == -1).all() and (description_of_two.rows[0] != -1).any()
    for other in (torch.eye(3).to_sparse(), torch.zeros(1, 1, 1)):
        assert Description([torch.eye(3)]).addresses([other]) is None


def test_addresses_of_many_tensors(way: str) -> None:
    tensors = list(torch.zeros(5000, 3).unbind())
    described = Description(tensors)
    found = described.addresses(tensors)
    assert found is not None and found.tolist() == [*(tensor.data_ptr() for tensor in tensors), 0]
    assert described.addresses(tensors[1:]) is None
    for other in (torch.zeros(4), torch.zeros(3).bfloat16(), torch.zeros(6)[::2], torch.zeros(1, 3)):
        assert described.addresses([*tensors[:-1], other]) is None
    assert described.addresses(tensors) is found
    tensors[7].data = torch.ones(3)
    assert described.addresses(tensors) is found and found[7] == tensors[7].data_ptr()
    torch.utils.swap_tensors(tensors[0], torch.zeros(2))
    assert described.addresses(tensors) is None


@pytest.mark.parametrize("other", [None, 5, "state", b"", object(), torch.nn.Parameter(torch.zeros(3))])
def test_what_is_no_such_tensor_is_not_looked_into(way: str, other: object) -> None:
    tensors = list(torch.zeros(40, 3).unbind())
    described = Description(tensors)
    for i in (0, 20, 39):
        try:
            found = described.addresses([*tensors[:i], other, *tensors[i + 1 :]])  # type: ignore[list-item]
        except AttributeError:  # which a plan expects
            assert way != "objects" and not isinstance(other, torch.Tensor)
        else:
            assert found is None or (way == "handles" and isinstance(other, torch.Tensor))


@pytest.mark.parametrize("lacking", ["_torch_functions", "_offset_of_pointer"])
def test_a_step_is_the_same_in_every_way(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that does not export the functions, or a Python whose objects lie otherwise."""
    results = []
    for found in (getattr(description, lacking)(), None):
        monkeypatch.setattr(description, lacking, lambda found=found: found)
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
