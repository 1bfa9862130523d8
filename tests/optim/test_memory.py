"""A report must equal what the optimizer really allocates."""

from typing import Any

import pytest
import torch
from torch import nn

import opt8bit
import opt8bit.optim
from opt8bit.optim import memory
from opt8bit.optim.base import Optimizer8bit

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "short blocks": {"block_size": 16},
    "long blocks": {"block_size": 16384},
    "every size": {"min_8bit_size": 0},
    "only large ones": {"min_8bit_size": 20_000},
    "full states": {"state_bits": 32},
}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Weights with and without short blocks, of rows too short, of one dimension, marked, and empty."""
    network = nn.Sequential(
        opt8bit.StableEmbedding(100, 64),
        nn.Linear(64, 300),
        nn.Linear(300, 40),
        nn.Conv2d(4, 1024, 1),  # rows of 4
        nn.Conv2d(16, 32, 3),
    )
    network.append(nn.ParameterList([torch.zeros(2**20), torch.zeros(0, 3)]))
    return network.to(dtype)


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param) if param.requires_grad else None
    if isinstance(optimizer, opt8bit.AdamWScheduleFree8bit):
        optimizer.train()
    optimizer.step()


def allocated(optimizer: torch.optim.Optimizer) -> int:
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def row(optimizer: Optimizer8bit) -> memory.OptimizerMemory:
    (only,) = opt8bit.memory_report(optimizer).rows
    return only


@pytest.fixture(params=memory.OPTIMIZERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.sampled(5)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_states_are_counted_as_they_are_allocated(name: str, options: dict[str, Any]) -> None:
    optimizer = memory.OPTIMIZERS[name](model().named_parameters(), **options)
    assert optimizer is not None
    before = row(optimizer)
    step(optimizer)
    assert before == row(optimizer)
    assert before.state_bytes == allocated(optimizer)
    full = memory.OPTIMIZERS[name](model().named_parameters(), **{**options, "state_bits": 32})
    assert full is not None
    step(full)
    assert before.state_bytes_32 == allocated(full)
    assert before.saved_bytes == allocated(full) - allocated(optimizer)


@pytest.mark.parametrize(
    "options", [{"caution": True}, {"fused": True}, {"capturable": True}, {"offload": True}, {"offload": "backward"}]
)
def test_options_that_change_no_state_change_no_report(options: dict[str, Any]) -> None:
    """Though each is refused by an optimizer of the report."""
    assert opt8bit.memory_report(model(), **options) == opt8bit.memory_report(model())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_counted(name: str, dtype: torch.dtype) -> None:
    network = model(dtype)
    optimizer = memory.OPTIMIZERS[name](network.named_parameters())
    assert optimizer is not None
    report = row(optimizer)
    step(optimizer)
    assert report.state_bytes == allocated(optimizer)
    elements = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    assert report.weight_bytes == report.gradient_bytes == elements * dtype.itemsize


def test_groups_keep_their_options() -> None:
    first, second = nn.Linear(300, 40), nn.Linear(300, 40)
    groups: list[dict[str, Any]] = [
        {"params": first.parameters(), "block_size": 64},
        {"params": second.parameters(), "state_bits": 32},
    ]
    optimizer = opt8bit.AdamW8bit(groups)
    report = row(optimizer)
    step(optimizer)
    assert report.state_bytes == allocated(optimizer)
    assert (report.full_parameters, report.full_elements) == (3, 40 + 300 * 40 + 40)


def test_what_stays_in_full_is_counted() -> None:
    report = row(opt8bit.AdamW8bit(model().parameters()))
    norm, biases, short_rows = 2 * 64, 300 + 40 + 1024 + 32, 4096
    assert (report.parameters, report.full_parameters) == (13, 9)
    assert report.full_elements == 6400 + norm + biases + short_rows


def test_states_stay_as_they_were_stored() -> None:
    optimizer = opt8bit.AdamW8bit(model().parameters())
    step(optimizer)
    optimizer.param_groups[0]["min_8bit_size"] = 10**9
    step(optimizer)
    assert row(optimizer).state_bytes == allocated(optimizer)


def test_frozen_parameters_are_weights_only() -> None:
    network = nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 300)).requires_grad_(False)
    network[0].requires_grad_(True)
    of_model = opt8bit.memory_report(network).rows[0]
    optimizer = opt8bit.AdamW8bit(network.parameters())
    assert of_model == row(optimizer)
    assert of_model.weight_bytes == 4 * (2 * 300 * 40 + 340)
    assert of_model.gradient_bytes == 4 * (300 * 40 + 40)
    step(optimizer)
    assert of_model.state_bytes == allocated(optimizer)


def test_weights_that_cannot_be_optimized_may_be_frozen() -> None:
    frozen = nn.ParameterList()
    network = nn.Sequential(nn.Linear(300, 40), frozen)
    frozen.append(nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False))
    assert opt8bit.memory_report(network).rows[0].weight_bytes == 4 * (300 * 40 + 40) + 10


def test_sgd_without_momentum_keeps_its_step_count() -> None:
    optimizer = opt8bit.SGD8bit(model().parameters())
    report = row(optimizer)
    step(optimizer)
    assert report.state_bytes == report.state_bytes_32 == allocated(optimizer)
    assert report.full_parameters == 0


def test_a_model_is_reported_under_every_optimizer_and_needs_no_memory() -> None:
    classes = {getattr(opt8bit.optim, exported) for exported in opt8bit.optim.__all__ if exported.endswith("8bit")}
    expected = {each for each in classes if isinstance(each, type) and issubclass(each, Optimizer8bit)}
    assert {type(make(model().named_parameters())) for make in memory.OPTIMIZERS.values()} == expected
    on_meta = opt8bit.memory_report(model().to("meta"), block_size=64)
    assert on_meta == opt8bit.memory_report(model(), block_size=64)
    assert on_meta != opt8bit.memory_report(model())
    assert [each.optimizer for each in on_meta.rows] == list(memory.OPTIMIZERS)


def test_a_report_leaves_the_optimizer_alone() -> None:
    optimizer = opt8bit.AdamW8bit(model().parameters())
    opt8bit.memory_report(optimizer)
    assert not optimizer.state


def test_a_report_prints_a_table() -> None:
    lines = str(opt8bit.memory_report(nn.Linear(1000, 5000))).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(memory.OPTIMIZERS)
    # 5,005,000 weights of 4 bytes; two states, each of codes and 4 absmaxes a row, and a bias of two full ones.
    assert lines[1].split() == (
        "AdamW8bit 20.02 MB 20.02 MB 40.04 MB 10.20 MB 29.84 MB 0.255 1 of 2 (5,000 of 5,005,000 elements)".split()
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (1_500_000, "1.50 MB"), (2_345_678_901_234, "2,345.68 GB")],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert memory.readable(size) == text


def test_what_cannot_be_reported_is_said() -> None:
    network = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"takes a module or an optimizer of opt8bit, got torch\.optim\.adam\.Adam"):
        opt8bit.memory_report(torch.optim.Adam(network.parameters()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="an optimizer has its own options; block_size can be given for a model"):
        opt8bit.memory_report(opt8bit.AdamW8bit(network.parameters()), block_size=64)
    with pytest.raises(ValueError, match="block_size must be an integer from 16 to 16384, got 8"):
        opt8bit.memory_report(network, block_size=8)
    with pytest.raises(ValueError, match="caution must be True or False, got 'yes'"):
        opt8bit.memory_report(network, caution="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="unexpected keyword argument 'block'"):
        opt8bit.memory_report(network, block=64)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        opt8bit.memory_report(network.requires_grad_(False))
