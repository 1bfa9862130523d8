"""What the processes of a training check among themselves: ``torchrun layouts.py FILE`` runs all checks for so many
processes, and leaves in the file what went wrong in each of them."""

from __future__ import annotations

import copy
import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import end
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import whole

import opt8bit
from opt8bit.optim import memory_report, to_torch_state_dict
from opt8bit.quant import decode_state, dynamic_map, quantize_blockwise

Check = Callable[[], None]
CHECKS: dict[int, list[Check]] = {2: [], 4: []}


def on(*ranks: int) -> Callable[[Check], Check]:
    """Registers a check for so many processes."""

    def register(check: Check) -> Check:
        for count in ranks:
            CHECKS[count].append(check)
        return check

    return register


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(whole: Tensor, mesh: Any, placements: Any) -> Tensor:
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),))


def assert_same(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """The parameters of two optimizers and their states have the same bits."""
    for ours, theirs in zip(parameters(found), parameters(expected), strict=True):
        assert torch.equal(whole(ours.detach()), theirs.detach())
        states = {name: whole(value) for name, value in found.state[ours].items()}
        assert states.keys() == expected.state[theirs].keys()
        for name, value in expected.state[theirs].items():
            assert torch.equal(states[name], value), name


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(
    kind: Any, shape: tuple[int, ...], on_mesh: Any, placements: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any]:
    """Three steps of one parameter, placed so, and plain."""
    values = random(*shape).to(dtype)
    params = [nn.Parameter(placed(values, on_mesh, placements)), nn.Parameter(values.clone())]
    optimizers = [kind([param], lr=1e-2, **options) for param in params]
    for number in range(3):
        grad = random(*shape, seed=number + 1).to(dtype)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = placed(grad, on_mesh, placements) if isinstance(param, DTensor) else grad
            optimizer.step()
    return tuple(optimizers)


@on(2, 4)
def columns_in_whole_blocks_are_8_bit() -> None:
    ranks = dist.get_world_size()
    for shape, block_size in (((16, 512 * ranks), 256), ((16, 300 * ranks), 100), ((16, 8 * ranks, 5, 5), 200)):
        sharded, plain = train(opt8bit.AdamW8bit, shape, mesh(), [Shard(1)], block_size=block_size)
        (state,) = sharded.state.values()
        assert state["exp_avg_scale"].placements == (Shard(1),) and state["exp_avg_codes"].dtype == torch.uint8
        assert_same(sharded, plain)


@on(2)
def columns_that_cut_blocks_are_32_bit_with_a_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"the states of 1 parameters are kept in 32 bits, as shards cut blocks"
    ) as told:
        sharded, _ = train(opt8bit.AdamW8bit, (16, 600), mesh(), [Shard(1)])
        sharded.add_param_group({"params": [nn.Parameter(placed(random(16, 600), mesh(), [Shard(1)]))]})
    assert [warning.filename for warning in told] == [__file__] * 2
    del sharded.param_groups[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, plain = train(opt8bit.AdamW8bit, (16, 600), mesh(), [Shard(0)], state_bits=32)
    assert_same(sharded, plain)


@on(2)
def replicas_are_stepped_as_the_whole() -> None:
    for kind in (opt8bit.AdamW8bit, opt8bit.LAMB8bit):
        assert_same(*train(kind, (16, 512), mesh(), [Replicate()]))


@on(2, 4)
def rules_that_look_at_whole_parameters() -> None:
    cases = (((18, 512), Shard(0)), ((3, 2048), Shard(0)), ((64, 1024), Shard(1)), ((16, 32), Shard(0)))
    for kind in (opt8bit.LAMB8bit, opt8bit.LARS8bit, opt8bit.Muon8bit):
        for shape, placement in cases:
            assert_same(*train(kind, shape, mesh(), [placement]))
    for kind in (opt8bit.AdamW8bit, opt8bit.Lion8bit, functools.partial(opt8bit.SGD8bit, momentum=0.9)):
        for shape, placement in cases:
            assert_same(*train(kind, shape, mesh(), [placement], caution=True))
    for use_muon in (True, False):
        for shape, placement in cases:
            assert_same(*train(opt8bit.MuonAdamW8bit, shape, mesh(), [placement], use_muon=use_muon))
    assert_same(*train(opt8bit.MuonAdamW8bit, (64, 1024), mesh(), [Shard(0)], use_muon=True, heads=8))
    assert_same(*train(opt8bit.MuonAdamW8bit, (6, 64, 96), mesh(), [Shard(0)], use_muon=True))
    options: dict[str, Any] = {"stochastic_rounding": True, "dtype": torch.bfloat16}
    assert_same(*train(opt8bit.LAMB8bit, (18, 512), mesh(), [Shard(0)], **options))


@on(4)
def two_dimensions_of_a_mesh() -> None:
    for placements in ([Shard(0), Shard(0)], [Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()]):
        assert_same(*train(opt8bit.AdamW8bit, (10, 1024), mesh(2, 2), placements))
    options: dict[str, Any] = {"stochastic_rounding": True, "dtype": torch.bfloat16}
    for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(0)]):
        assert_same(*train(opt8bit.AdamW8bit, (10, 1024), mesh(2, 2), placements, **options))


@on(2)
def a_partial_gradient_is_summed() -> None:
    values, grads = random(16, 512), [random(16, 512, seed=seed) for seed in (1, 2)]
    sharded, plain = nn.Parameter(placed(values, mesh(), [Shard(0)])), nn.Parameter(values.clone())
    sharded.grad = DTensor.from_local(grads[dist.get_rank()], mesh(), [Partial()], run_check=False)
    plain.grad = grads[0] + grads[1]
    optimizers = [opt8bit.AdamW8bit([param], lr=1e-2) for param in (sharded, plain)]
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*optimizers)


@on(2)
def what_cannot_be_stepped_is_refused() -> None:
    def param(*placements: Any, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(placed(random(16, 512).to(dtype), mesh(), placements))

    with pytest.raises(TypeError, match="LAMB8bit looks at whole parameters: of shards it takes no offload"):
        opt8bit.LAMB8bit([param(Shard(0))], lr=1e-2, offload=True)
    with pytest.raises(TypeError, match="sharded along dimension 0 alone, got a DTensor placed as"):
        opt8bit.AdamW8bit([param(Shard(1), dtype=torch.bfloat16)], stochastic_rounding=True)
    partial = nn.Parameter(DTensor.from_local(random(16, 512), mesh(), [Partial()], run_check=False))
    with pytest.raises(TypeError, match="must be sharded or replicated, got a DTensor placed as"):
        opt8bit.AdamW8bit([partial])
    plain = nn.Parameter(random(16, 512))
    optimizer = opt8bit.AdamW8bit([plain])
    plain.grad = placed(random(16, 512), mesh(), [Shard(0)])
    with pytest.raises(RuntimeError, match="a DTensor cannot be the gradient of a Parameter"):
        optimizer.step()
    assert not optimizer.state and torch.equal(plain, random(16, 512))


class Net(nn.Module):
    """Two blocks on an embedding."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(67, width)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}) for _ in range(2)
        )
        self.head = nn.Linear(width, 67)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x)


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, clip: float | None = None
) -> list[float]:
    """Of a training on the same few tokens in all processes, so that the mean of their gradients is any one of them."""
    ids = torch.randint(67, (4, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        found.append(loss.item())
    return found


def fully_sharded(model: Net, **options: Any) -> Net:
    for block in model.blocks:
        fully_shard(block["up"], **options)
        fully_shard(block["down"], **options)
    return fully_shard(model, **options)  # type: ignore[return-value]


@on(2, 4)
def fsdp2_trains_as_one_process() -> None:
    results = []
    for model, offload in ((fully_sharded(Net()), False), (fully_sharded(Net()), True), (Net(), False)):
        optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=offload)
        results.append((losses(model, optimizer), optimizer))
    expected, plain = results[-1]
    assert expected[-1] < expected[0]
    for found, optimizer in results[:-1]:
        assert found == expected
        assert_same(optimizer, plain)


@on(2)
def fsdp2_trains_with_clipped_gradients_and_in_mixed_precision() -> None:
    exact = Net()
    expected = losses(exact, opt8bit.AdamW8bit(exact.parameters(), lr=1e-2), clip=0.5)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options, tolerance in (({}, 1e-3), ({"mp_policy": policy}, 0.05)):
        model = fully_sharded(Net(), **options)
        optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
        assert losses(model, optimizer, clip=0.5) == pytest.approx(expected, abs=tolerance)
        assert all(param.dtype == torch.float32 for param in model.parameters())


@on(2, 4)
def the_memory_report_tells_what_each_process_has() -> None:
    model = fully_sharded(Net())
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
    losses(model, optimizer, 1)
    values = [value for state in optimizer.state.values() for value in state.values()]
    parts = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    has = sum(part.numel() * part.element_size() for part in parts)
    (row,) = memory_report(optimizer).rows
    assert row.state_bytes == has
    all_have: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_have, has)
    assert memory_report(Net(), ranks=dist.get_world_size()).rows[0].state_bytes == max(all_have)
    with pytest.raises(ValueError, match="sharded already: leave ranks out, got 2"):
        memory_report(model, ranks=2)


@on(2)
def state_errors_are_those_of_the_whole() -> None:
    whole = nn.Parameter(random(16, 512))
    param = nn.Parameter(placed(whole.detach(), mesh(), [Shard(0)]))
    optimizers = [opt8bit.AdamW8bit([each]) for each in (whole, param)]
    twins = [opt8bit.AdamW8bit([each], lr=0, state_bits=32) for each in (whole, param)]
    for number in range(2):
        whole.grad = random(16, 512, seed=number)
        param.grad = placed(whole.grad, mesh(), [Shard(0)])
        for each in (*twins, *optimizers):
            each.step()
    assert opt8bit.state_error(optimizers[1]) == opt8bit.state_error(optimizers[0])
    assert opt8bit.state_error(*(each[1] for each in (optimizers, twins))) == opt8bit.state_error(
        *(each[0] for each in (optimizers, twins))
    )
    with pytest.raises(TypeError, match="x must be a plain tensor, got a DTensor"):
        quantize_blockwise(param, dynamic_map(), 64)


@on(4)
def fsdp2_over_tensor_parallelism() -> None:
    results = []
    for is_parallel in (True, False):
        model = Net()
        if is_parallel:
            grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            for block in model.blocks:
                parallelize_module(block, grid["model"], plan)
            model = fully_sharded(model, mesh=grid["data"])
        optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, block_size=128)
        results.append((losses(model, optimizer, 1), losses(model, optimizer), optimizer, model))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-2)  # sums in another order
    parallel, plain = (dict(model.named_parameters()) for *_, model in results)
    for name, param in plain.items():
        mine, theirs = results[0][2].state[parallel[name]], results[1][2].state[param]
        assert mine.keys() == theirs.keys(), name
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}


@on(2)
def ddp_and_zero() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of itself

    plain = Net()
    optimizer = opt8bit.AdamW8bit(plain.parameters(), lr=1e-2)
    expected = losses(plain, optimizer)
    model = Net()
    replicated: nn.Module = DistributedDataParallel(model)
    ours = opt8bit.AdamW8bit(replicated.parameters(), lr=1e-2)
    assert losses(replicated, ours) == expected
    assert_same(ours, optimizer)

    model = Net()
    replicated = DistributedDataParallel(model)
    zero = ZeroRedundancyOptimizer(replicated.parameters(), optimizer_class=opt8bit.AdamW8bit, lr=1e-2)
    assert losses(replicated, zero) == expected
    assert 0 < len(zero.optim.state) < len(list(model.parameters()))
    zero.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        again = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
        again.load_state_dict(zero.state_dict())
        assert_same(again, optimizer)


@on(2)
def a_full_state_dict_is_that_of_one_process() -> None:
    plain, model = Net(), fully_sharded(Net())
    optimizers = [opt8bit.AdamW8bit(of.parameters(), lr=1e-2, compensation=False) for of in (plain, model)]
    for of, optimizer in zip((plain, model), optimizers, strict=True):
        losses(of, optimizer)
    expected: Any = get_optimizer_state_dict(plain, optimizers[0])
    full: Any = get_optimizer_state_dict(model, optimizers[1], options=StateDictOptions(full_state_dict=True))
    for name, state in expected["state"].items():
        for key, value in state.items():
            assert torch.equal(full["state"][name][key], value), (name, key)

    model.zero_grad()  # with gradients at hand torch would not make the states to fill
    for from_one in (False, True):
        again = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_one)
        given = copy.deepcopy(expected) if not from_one or dist.get_rank() == 0 else {}
        set_optimizer_state_dict(model, again, given, options=options)
        assert_same(again, optimizers[0])

    again = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
    again.load_state_dict(optimizers[0].state_dict())  # whole tensors, of which each process takes its part
    assert_same(again, optimizers[0])


@on(2)
def states_go_to_torch_and_come_from_it() -> None:
    models = (Net(), fully_sharded(Net()))
    theirs = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for model, optimizer in zip(models, theirs, strict=True):
        losses(model, optimizer)
    ours = [opt8bit.AdamW8bit(model.parameters(), lr=1e-2) for model in models]
    for optimizer, source in zip(ours, theirs, strict=True):
        optimizer.load_state_dict(source.state_dict())
    assert_same(ours[1], ours[0])
    for optimizer, target in zip(ours, theirs, strict=True):
        target.load_state_dict(to_torch_state_dict(optimizer))
    assert_same(theirs[1], theirs[0])


@on(2)
def an_infinity_anywhere_skips_the_step_everywhere() -> None:
    param = nn.Parameter(placed(random(16, 512), mesh(), [Shard(0)]))
    optimizer = opt8bit.AdamW8bit([param], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for is_infinite in (True, False):
        grad = 8 * random(16, 512, seed=1)
        grad[0, 0] = torch.inf if is_infinite else 8.0
        scaler.scale(torch.zeros(()))
        param.grad = placed(grad, mesh(), [Shard(0)])
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(whole(param.detach()), random(16, 512)) == is_infinite


@on(2)
def damaged_checkpoints_are_refused() -> None:
    model = fully_sharded(Net())
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
    losses(model, optimizer)
    before = copy.deepcopy({n: {k: whole(v) for k, v in s.items()} for n, s in enumerate(optimizer.state.values())})

    def unchanged() -> bool:
        states = enumerate(optimizer.state.values())
        return all(torch.equal(whole(value), before[n][key]) for n, state in states for key, value in state.items())

    saved: Any = get_optimizer_state_dict(model, optimizer)
    for change, message in (
        (
            lambda state: state["tokens.weight"].pop("exp_avg_scale"),
            "'tokens.weight', of .* lacks the state 'exp_avg_scale'",
        ),
        (
            lambda state: state["tokens.weight"].update(exp_avg_codes=state["head.bias"]["exp_avg"]),
            r"'tokens.weight': state 'exp_avg_codes' must have shape \(67, 64\), got \(67,\)",
        ),
        (
            lambda state: state["blocks.0.up.weight"].update(
                exp_avg_sq_codes=state["blocks.0.down.weight"]["exp_avg_sq_codes"]
            ),
            r"'blocks.0.up.weight': state 'exp_avg_sq_codes' must have shape \(256, 64\), got \(64, 256\)",
        ),
    ):
        damaged = {**saved, "state": {name: dict(state) for name, state in saved["state"].items()}}
        change(damaged["state"])
        with pytest.raises(ValueError, match=message):
            set_optimizer_state_dict(model, optimizer, damaged)
        assert unchanged()
    mixed = {**saved, "state": {name: dict(state) for name, state in saved["state"].items()}}
    mixed["state"]["head.weight"]["exp_avg_codes"] = whole(saved["state"]["head.weight"]["exp_avg_codes"])
    set_optimizer_state_dict(model, optimizer, mixed)
    assert unchanged()

    mine = copy.deepcopy(optimizer.state_dict())
    if dist.get_rank() == 1:
        mine["state"][0]["exp_avg_scale"].to_local()[0] = torch.nan
    word = "must be finite" if dist.get_rank() == 1 else "another process has refused its part"
    with pytest.raises(ValueError, match=word):
        optimizer.load_state_dict(mine)
    assert unchanged()


@on(2)
def states_are_read_whole_where_they_lie_otherwise() -> None:
    for shape, block_size, before, after in (
        ((16, 2880), 256, Shard(0), Shard(1)),
        ((16, 2880), 300, Shard(0), Shard(1)),
        ((16, 600), 256, Shard(0), Shard(1)),
        ((16, 1024), 256, Shard(1), Shard(0)),
        ((16, 1024), 128, Replicate(), Shard(1)),
    ):
        source, plain = train(opt8bit.AdamW8bit, shape, mesh(), [before], block_size=block_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shards that cut blocks
            placements = [after]
            param = nn.Parameter(placed(random(*shape), mesh(), placements))
            target = opt8bit.AdamW8bit([param], lr=1e-2)
        expected = opt8bit.AdamW8bit([nn.Parameter(random(*shape))], lr=1e-2)
        for optimizer, of in ((target, source), (expected, plain)):
            optimizer.load_state_dict(of.state_dict())
        (found,), (wanted,) = target.state.values(), expected.state.values()
        if "exp_avg_scale" in found:
            assert all(torch.equal(whole(found[name]), value) for name, value in wanted.items())
        else:  # shards that cut blocks: in full
            (stored,) = plain.state.values()
            exact = decode_state(stored["exp_avg_codes"], stored["exp_avg_scale"], True, block_size)
            assert torch.equal(whole(found["exp_avg"]), exact)


@on(2)
def blocks_that_were_cut_in_a_checkpoint_are_put_together() -> None:
    """As torch distributes a full state dict: by the parameters' placements, whatever the blocks are."""
    _, plain = train(opt8bit.AdamW8bit, (16, 2880), mesh(), [Shard(0)], block_size=300)
    saved = copy.deepcopy(plain.state_dict())
    for name, value in saved["state"][0].items():
        if value.dim():
            saved["state"][0][name] = placed(value, mesh(), [Shard(1)])
    target = opt8bit.AdamW8bit([nn.Parameter(placed(random(16, 2880), mesh(), [Shard(1)]))], block_size=288)
    expected = opt8bit.AdamW8bit([nn.Parameter(random(16, 2880))], block_size=288)
    target.load_state_dict(saved)
    expected.load_state_dict(plain.state_dict())
    (found,), (wanted,) = target.state.values(), expected.state.values()
    assert "exp_avg_scale" in found and all(torch.equal(whole(found[name]), value) for name, value in wanted.items())


@on(2)
def the_reference_steps_an_empty_shard() -> None:
    assert_same(*train(opt8bit.AdamW8bit, (1, 8192), mesh(), [Shard(0)], fused=False))


@on(2)
def a_stable_embedding_keeps_its_states_in_full() -> None:
    model = nn.Sequential(opt8bit.StableEmbedding(64, 256), nn.Linear(256, 64))
    fully_shard(model)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    states = {name: optimizer.state[param] for name, param in model.named_parameters()}
    assert states["0.weight"]["exp_avg"].dtype == torch.float32 and "exp_avg_codes" not in states["0.weight"]
    assert states["1.weight"]["exp_avg_codes"].dtype == torch.uint8 and "exp_avg" not in states["1.weight"]


@on(2)
def shards_lack_state_bits_until_they_are_marked_or_in_a_group() -> None:
    model: Any = nn.Linear(64, 128)
    model.weight.state_bits = 32
    fully_shard(model)

    def states(params: Any) -> dict[str, Any]:
        optimizer = opt8bit.AdamW8bit(params)
        model(random(8, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.state[model.weight]

    assert "exp_avg_codes" in states([model.weight])
    assert "exp_avg" in states([{"params": [model.weight], "state_bits": 32}])
    model.weight.state_bits = 32
    assert "exp_avg" in states([model.weight])


@on(2)
def flat_parameters_are_32_bit_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Of parameters with two dimensions or more") as told:
        sharded, _ = train(opt8bit.SGD8bit, (2**20,), mesh(), [Shard(0)], momentum=0.9)
    assert [warning.filename for warning in told] == [__file__]
    (state,) = sharded.state.values()
    assert state["momentum_buffer"].dtype == torch.float32
    row = memory_report(opt8bit.SGD8bit([nn.Parameter(torch.zeros(2**20))], momentum=0.9), ranks=2).rows[0]
    assert row.state_bytes == 4 * 2**19 + 4


@on(2)
def ddp_is_refused_beside_the_backward_pass() -> None:
    replicated = DistributedDataParallel(Net())
    optimizer = opt8bit.AdamW8bit(replicated.parameters(), lr=1e-2, offload="backward")
    with pytest.raises(RuntimeError, match="averaged over processes by DDP; use offload=True"):
        losses(replicated, optimizer, 1)
    plain, model = Net(), Net()
    optimizers = [
        opt8bit.AdamW8bit(of.parameters(), lr=1e-2, offload=where) for of, where in ((plain, False), (model, True))
    ]
    assert losses(DistributedDataParallel(model), optimizers[1]) == losses(plain, optimizers[0])


@on(2)
def a_failed_step_changes_nothing() -> None:
    weight, bias = nn.Parameter(placed(random(16, 512), mesh(), [Shard(0)])), nn.Parameter(random(16))
    optimizer = opt8bit.LAMB8bit([weight, bias], lr=1e-2)
    for number in range(2):
        weight.grad, bias.grad = placed(random(16, 512, seed=1), mesh(), [Shard(0)]), random(16, seed=2)
        before = bias.detach().clone()
        if number == 0:
            optimizer.step()
            optimizer.param_groups[0]["block_size"] = 64
        else:
            with pytest.raises(ValueError, match="with block_size 64, state 'exp_avg_scale' must be"):
                optimizer.step()
            assert torch.equal(bias, before)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, str] = {}
    for check in CHECKS[dist.get_world_size()]:
        torch.manual_seed(0)
        try:
            check()
            error = ""
        except BaseException:
            error = traceback.format_exc()
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        found[check.__name__] = "\n".join(filter(None, errors))
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
