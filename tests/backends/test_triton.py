"""The kernels in Triton: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import CASES, assert_states_agree, gradients, parameter
from torch import Tensor, nn

import opt8bit
from opt8bit import backends
from opt8bit.backends import available, backend_for, native
from opt8bit.optim.every import OPTIMIZERS
from opt8bit.optim.options import Options
from opt8bit.quant import (
    dequantize_blockwise,
    dynamic_map,
    encode_state,
    linear_map,
    normal_float,
    quantize_blockwise,
    state_map,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from opt8bit.backends import triton as ours  # noqa: E402
from opt8bit.backends.triton import codebook  # noqa: E402
from opt8bit.backends.triton.launches import OPTIONS  # noqa: E402

DEVICE = next((kind for kind in backends.TRITON_DEVICES if getattr(torch, kind).is_available()), "cpu")
pytestmark = [
    *([pytest.mark.gpu] if DEVICE != "cpu" else []),
    pytest.mark.skipif(
        "triton" not in available(DEVICE), reason="Triton serves no device here, and is not interpreting"
    ),
]

SHAPES = ((32, 300), (5,), (4, 64, 20), (17, 256), (300, 16), (0, 3), ())
ONE_OF_EACH_RULE = cases.one_of_each_rule()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    return functools.partial(cases.use, monkeypatch)


def trained(
    case: str, steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Tensor], list[dict]]:
    """Parameters of many shapes and their states, after some steps on gradients of many sizes."""
    ours, _, hyper = CASES[case]
    params = [nn.Parameter(parameter(i, shape, dtype).to(DEVICE)) for i, shape in enumerate(SHAPES)]
    optimizer = ours(params, **{**hyper, **options})
    step(optimizer, params, range(steps))
    return [param.detach().cpu() for param in params], states_of(optimizer, params)


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        for i, param in enumerate(params):
            grad = gradients(1, tuple(param.shape), 100 * seed + i)[0]
            param.grad = grad.to(DEVICE, param.dtype)
        optimizer.step()


def states_of(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[dict[str, Tensor]]:
    return [{name: value.cpu() for name, value in optimizer.state[param].items()} for param in params]


def compare(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], share: float = 1e-3) -> None:
    """Codes are at most one level apart, on at most that share of them; values agree as float32 does."""
    for mine, theirs in zip(found, expected, strict=True):
        assert_states_agree(mine, theirs, share=share, rtol=1e-5, atol=1e-30)


def steps() -> Iterator[Any]:
    """Cases and the bits of their states. Interpreted, only the cases with most hyper-parameters are quick enough."""
    interpreted = pytest.mark.slow if DEVICE == "cpu" else ()
    for name in CASES:
        yield pytest.param(name, 8, marks=() if name in ONE_OF_EACH_RULE.values() else interpreted)
    for name in ONE_OF_EACH_RULE.values():
        yield pytest.param(name, 32, marks=interpreted)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("case", "bits"), list(steps()))
def test_a_step_is_the_references(case: str, bits: int, use: Any) -> None:
    results = []
    for backend in ("reference", "triton"):
        use(backend)
        results.append(trained(case, 1, state_bits=bits))
    (params, states), (found, found_states) = results
    torch.testing.assert_close(found, params, rtol=1e-5, atol=1e-5)
    compare(found_states, states)


def test_every_rule_is_tested() -> None:
    rules = [rule for kind in OPTIMIZERS for rule in kind.rules]
    assert {rule.name for rule in rules if ours.functions_of(rule)} == {*native.rules()}


WAYS: dict[str, Options] = {
    "nearest": {},
    "stochastic": {"stochastic_rounding": True, "seed": 2**63 - 1},
    "compensated": {"compensation": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_round_as_the_references(dtype: torch.dtype, way: str, use: Any) -> None:
    """Plain SGD by powers of two, exact in both: what is left is the rounding."""
    if dtype == torch.float16 and way != "nearest":
        pytest.skip("for bfloat16 alone")
    results = []
    for backend in ("reference", "triton"):
        use(backend)
        params = [nn.Parameter(parameter(i, shape, dtype).to(DEVICE)) for i, shape in enumerate(SHAPES)]
        optimizer = opt8bit.SGD8bit(params, lr=2.0**-9, **WAYS[way])
        for _ in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.75)
            optimizer.step()
        results.append(([param.detach().cpu() for param in params], states_of(optimizer, params)))
    assert all(torch.equal(*pair) for pair in zip(results[0][0], results[1][0], strict=True))
    compare(results[1][1], results[0][1], share=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_16_bit_parameters(dtype: torch.dtype, use: Any) -> None:
    results = []
    for backend in ("reference", "triton"):
        use(backend)
        results.append(trained("AdamW8bit weight decay", 1, dtype))
    compare(results[1][1], results[0][1])
    for found, expected in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-3)  # an ulp, on either side of a tie


def adversarial(values: Tensor) -> Tensor:
    """(n, 256) blocks at many scales: the codebook's midpoints, and their neighbours in float32."""
    between = codebook.midpoints(values)[1:-1]
    blocks = []
    for absmax in (1.0, 1.1754944e-38, 1e-45, 3.0e38, 0.7324219, 123.45679, 2.0**-100, 2.0**101):
        scale = torch.tensor(absmax, dtype=torch.float32)
        exact = (between * scale.double()).float()
        for x in (exact, exact.nextafter(torch.tensor(torch.inf)), exact.nextafter(torch.tensor(-torch.inf))):
            blocks.append(torch.cat([x.clamp(-scale, scale), scale[None]]))
            blocks.append(torch.cat([-x.clamp(-scale, scale), scale[None]]))
    return torch.stack(blocks)


def assert_nearest(blocks: Tensor, signed: bool) -> None:
    """By the encoder of the steps, a block a program."""
    codes, scales = torch.empty(blocks.shape, dtype=torch.int32), torch.empty(len(blocks))
    table = state_map(signed)
    tables, between = codebook.tables(table, signed), codebook.midpoints(table)
    arguments = [tensor.to(DEVICE) for tensor in (blocks, scales, codes, tables, between)]
    encode_kernel[(len(blocks),)](*arguments, signed, blocks.shape[1], **OPTIONS)
    expected, expected_scale = encode_state(blocks, signed, blocks.shape[1], backend="reference")
    assert torch.equal(arguments[2].cpu(), expected.int())
    assert torch.equal(arguments[1].cpu(), expected_scale[:, 0])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed: bool) -> None:
    """At every midpoint, in blocks whose largest is positive, or negative."""
    x = adversarial(dynamic_map(signed))
    assert_nearest(torch.cat([x, -x]) if signed else x.abs(), signed)


@pytest.mark.parametrize(("signed", "count"), [(True, 100), pytest.param(False, 2500, marks=pytest.mark.slow)])
def test_the_slow_path_is_taken_where_it_must_be(signed: bool, count: int) -> None:
    """One value near a midpoint in a tile: its neighbours do not send it there."""
    x = adversarial(dynamic_map(signed))
    x = x if signed else x.abs()
    chosen = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))[:count]
    blocks = torch.stack([x.flatten()[chosen], x.abs().amax(1)[chosen // 256]], 1)
    if signed:
        blocks[::2] *= -1
    assert_nearest(blocks, signed)


@triton.jit
def encode_kernel(
    x,
    scales,
    codes,
    tables,
    midpoints,
    SIGNED: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
    BLOCK: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
):
    """As store_state of the steps."""
    row = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.arange(0, BLOCK)[None, :]
    places = row[:, None] * BLOCK + columns
    state = tl.load(x + places)
    scale = codebook.first_largest(state, columns) if SIGNED else tl.max(state, 1)
    found = codebook.encode(state, scale, tables, midpoints, SIGNED)
    if not SIGNED:
        found = codebook.kept_positive(found, state)
    tl.store(codes + places, found)
    tl.store(scales + row, scale)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("block_size", [16, 100, 256, 4096])
@pytest.mark.parametrize("values", [dynamic_map(), dynamic_map(False), linear_map(bits=3), normal_float(4)])
def test_quantization_is_the_references(values: Tensor, block_size: int) -> None:
    x = torch.cat([adversarial(values).flatten(), torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])])
    x = torch.cat([x, x.new_zeros(-len(x) % 5000)]).view(-1, 5000)
    expected = quantize_blockwise(x, values, block_size, backend="reference")
    found = quantize_blockwise(x.to(DEVICE), values, block_size, backend="triton")
    assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(found, expected, strict=True))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theirs = dequantize_blockwise(*expected, values, block_size, dtype=dtype, backend="reference")
        mine = dequantize_blockwise(*found, values, block_size, dtype=dtype, backend="triton")
        assert torch.equal(mine.cpu(), theirs)


def test_tables_have_a_line_for_every_binade() -> None:
    for signed in (True, False):
        table = codebook.tables(state_map(signed), signed)
        ends = table[codebook.LINE_END.value : codebook.SLOPE.value]
        lines = ends.view(torch.int32) & 15
        assert (
            int(lines[0]) == 0 and int(lines[31]) == 8 and bool((lines.diff() >= 0).all() and (lines.diff() <= 1).all())
        )
        inside = ends < 1
        assert bool((ends[inside] > 2.0 ** (torch.arange(32)[inside] - 31.0)).all()) and int(inside.sum()) == 8


@pytest.mark.parametrize("case", ["AdamW8bit weight decay", "LAMB8bit defaults", "SGD8bit momentum"])
def test_a_scaler_is_honoured(case: str, use: Any) -> None:
    """The gradients are unscaled in the same pass; one with infinities changes nothing, nor does it count."""
    results = []
    for backend in ("reference", "triton"):
        use(backend)
        ours, _, hyper = CASES[case]
        param = nn.Parameter(parameter().to(DEVICE))
        optimizer: Any = ours([param], **hyper)
        optimizer.grad_scale = torch.tensor([1024.0], device=DEVICE)
        for found_inf in (0.0, 1.0):
            optimizer.found_inf = torch.tensor([found_inf], device=DEVICE)
            before = param.detach().clone(), {key: value.clone() for key, value in optimizer.state[param].items()}
            param.grad = torch.randn(32, 300, generator=torch.Generator().manual_seed(1)).mul(1024).to(DEVICE)
            optimizer.step()
        assert torch.equal(param, before[0])
        assert all(torch.equal(value, before[1][key]) for key, value in optimizer.state[param].items())
        results.append((param.detach().cpu(), states_of(optimizer, [param])))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    compare(results[1][1], results[0][1])
    assert results[1][1][0]["step"] == 1


def test_a_scaler_without_a_step_yet(use: Any) -> None:
    """The first step is skipped: its count, 0, is not one that corrections can be made for."""
    use("triton")
    for case in ("AdamW8bit weight decay", "LAMB8bit defaults"):
        ours, _, hyper = CASES[case]
        param = nn.Parameter(parameter().to(DEVICE))
        optimizer: Any = ours([param], **hyper)
        optimizer.found_inf = torch.ones((), device=DEVICE)
        param.grad = torch.full_like(param, torch.inf)
        optimizer.step()
        assert torch.equal(param.detach().cpu(), parameter().detach())
        assert optimizer.state[param]["step"] == 0


def test_training_goes_on_where_another_backend_left_it(use: Any) -> None:
    """From the reference to Triton and back, through state dicts; each has the counts of steps where it wants them."""
    optimizer: Any = None
    state: dict[str, Any] = {}
    params = [nn.Parameter(parameter(i, shape).to(DEVICE)) for i, shape in enumerate(SHAPES)]
    expected, expected_states = trained("AdamW8bit weight decay", 3)
    for seed, backend in enumerate(("reference", "triton", "reference")):
        use(backend)
        optimizer = opt8bit.AdamW8bit(params, weight_decay=0.1)
        if state:
            optimizer.load_state_dict(state)
        step(optimizer, params, range(seed, seed + 1))
        state = optimizer.state_dict()
        place = DEVICE if backend == "triton" else "cpu"
        assert {optimizer.state[param]["step"].device.type for param in params} == {place}
    torch.testing.assert_close([param.detach().cpu() for param in params], expected, rtol=1e-4, atol=1e-4)
    assert [value["step"] for value in states_of(optimizer, params)] == [3.0] * len(params)
    assert expected_states[0]["step"] == 3


def test_the_backend_changes_between_steps(use: Any) -> None:
    """Counts of steps move with it, and the state dict's form does not change."""
    params = [nn.Parameter(parameter().to(DEVICE))]
    optimizer = opt8bit.AdamW8bit(params)
    for seed, backend in enumerate(("triton", "reference", "triton")):
        use(backend)
        step(optimizer, params, range(seed, seed + 1))
        assert optimizer.state[params[0]]["step"] == seed + 1


def test_lr_may_be_on_the_device(use: Any) -> None:
    """Read by the kernels; nothing waits for it."""
    use("triton")
    results = []
    for lr in (0.01, torch.tensor(0.01, device=DEVICE), torch.tensor([0.01], dtype=torch.float64, device=DEVICE)):
        param = nn.Parameter(parameter().to(DEVICE))
        optimizer = opt8bit.AdamW8bit([param], lr=lr)
        param.grad = torch.ones_like(param)
        asked = optimizer._all_asked(set())
        shares = optimizer._planned(None, asked, fresh := {}, (None, None))
        optimizer._take([], fresh, False)
        for backend, step in shares:  # as on a GPU, where lr is left on it
            backend.step(step._replace(hyper=[{**asked[0].hyper, "lr": lr}]))
        assert optimizer.state[param]["step"] == 1
        results.append(param.detach().cpu())
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)


def test_nobody_looks_at_what_lies_on_a_device() -> None:
    """A tensor on the meta device raises where it is looked at, which on a GPU would wait."""
    param = nn.Parameter(torch.randn(64, 64))
    optimizer = opt8bit.AdamW8bit([param], lr=torch.tensor(0.01, device="meta"))
    optimizer.check_group(optimizer.param_groups[0])
    assert optimizer.hyper(optimizer.param_groups[0])["lr"] is optimizer.param_groups[0]["lr"]


def test_wide_parameters_are_counted_on_the_host(use: Any) -> None:
    """The reference, which serves them, would wait for each of their counts."""
    use("triton")
    param = nn.Parameter(torch.randn(64, 64, dtype=torch.float64, device=DEVICE))
    optimizer = opt8bit.AdamW8bit([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["step"].device.type == "cpu" and optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_torchs_default_dtype_has_no_say(dtype: torch.dtype, use: Any) -> None:
    use("triton")
    grads = gradients(3)
    results = []
    for default in (torch.float32, dtype):
        param = nn.Parameter(parameter().to(DEVICE))
        torch.set_default_dtype(default)
        try:
            optimizer = opt8bit.AdamW8bit([param])
            for grad in grads:
                param.grad = grad.to(DEVICE)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([param.detach(), *optimizer.state[param].values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_new_gradient_at_another_address(use: Any) -> None:
    """Addresses that are not multiples of 16 take narrow loads, and the same numbers come out."""
    use("triton")
    results = []
    for offset in (0, 1, 0):
        param = nn.Parameter(parameter(shape=(32, 256)).to(DEVICE))
        optimizer = opt8bit.AdamW8bit([param])
        for step_number in range(2):
            memory = torch.zeros(32 * 256 + 1, device=DEVICE)
            grad = torch.randn(32 * 256, generator=torch.Generator().manual_seed(step_number)).to(DEVICE)
            start = offset * step_number
            param.grad = memory[start : start + 32 * 256].copy_(grad).view(32, 256)
            optimizer.step()
        results.append(param.detach().cpu())
    assert torch.equal(results[0], results[1])


@pytest.mark.skipif(DEVICE == "cpu", reason="takes two devices")
def test_one_group_on_two_devices() -> None:
    params = [nn.Parameter(parameter().to(device)) for device in (DEVICE, "cpu")]
    optimizer = opt8bit.AdamW8bit(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    states = [optimizer.state[param] for param in params]
    assert [state["step"].device.type for state in states] == [DEVICE, "cpu"]
    torch.testing.assert_close(params[0].cpu(), params[1], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="counts what a GPU is given to do")
def test_launches_do_not_grow_with_the_number_of_tensors() -> None:
    def launches(count: int) -> int:
        params = [nn.Parameter(torch.randn(64, 64, device=DEVICE)) for _ in range(count)]
        optimizer = opt8bit.AdamW8bit(params)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        activity = getattr(torch.profiler.ProfilerActivity, DEVICE.upper())
        with torch.profiler.profile(activities=[activity]) as profile:
            optimizer.step()
        # Beside what the device does, the profiler counts what the host calls to have it done.
        return sum(event.count for event in profile.key_averages() if event.device_type.name == DEVICE.upper())

    assert launches(1000) == launches(10) > 0


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_replays_what_steps_do(dtype: torch.dtype) -> None:
    results = []
    for captured in (False, True):
        params = [nn.Parameter(parameter(i, shape, dtype).to(DEVICE)) for i, shape in enumerate(((64, 300), (7,)))]
        lr = torch.tensor(0.01, device=DEVICE)
        optimizer = opt8bit.AdamW8bit(params, lr=lr, capturable=True)
        for param in params:
            param.grad = torch.ones_like(param)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for i in range(4):
            lr.fill_(0.01 / (i + 1))
            for param in params:
                assert param.grad is not None
                param.grad.fill_(float(i))
            if captured:
                graph.replay()
            else:
                optimizer.step()
        results.append((params, states_of(optimizer, params)))
    assert all(torch.equal(*pair) for pair in zip(results[0][0], results[1][0], strict=True))
    assert all(
        torch.equal(value, mine[key])
        for value_of, mine in zip(results[0][1], results[1][1], strict=True)
        for key, value in value_of.items()
    )


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
def test_a_capture_takes_capturable() -> None:
    param = nn.Parameter(torch.randn(64, 64, device=DEVICE))
    optimizer = opt8bit.AdamW8bit([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        param.grad.zero_()  # torch warns of graphs that hold nothing
        with pytest.raises(RuntimeError, match="that takes capturable=True"):
            optimizer.step()


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
def test_a_capture_takes_a_step_like_one_before() -> None:
    memory = torch.zeros(64 * 64 + 1, device=DEVICE)
    param = nn.Parameter(torch.randn(64, 64, device=DEVICE))
    optimizer = opt8bit.AdamW8bit([param], capturable=True)
    param.grad = memory[:-1].view(64, 64)
    optimizer.step()
    param.grad = memory[1:].view(64, 64)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        memory.zero_()
        with pytest.raises(RuntimeError, match="a step that is captured must be like one before"):
            optimizer.step()


def test_capturable_takes_rules_with_kernels(use: Any) -> None:
    use("triton")
    matrix = nn.Parameter(torch.randn(64, 64, device=DEVICE))
    opt8bit.AdamW8bit([matrix], capturable=True)
    with pytest.raises(ValueError, match=f"capturable must be left out for Muon8bit on {DEVICE}.*, where no kernels"):
        opt8bit.Muon8bit([matrix], capturable=True)
    wide = nn.Parameter(torch.randn(64, 64, device=DEVICE, dtype=torch.float64))
    with pytest.raises(ValueError, match="capturable must be left out for AdamW8bit"):
        opt8bit.AdamW8bit([wide], capturable=True)
    optimizer = opt8bit.AdamW8bit([matrix], capturable=True, fused=False)
    matrix.grad = torch.ones_like(matrix)
    with pytest.raises(ValueError, match=r"none serve adamw for a parameter of torch.float32"):
        optimizer.step()
    assert not optimizer.state[matrix]


def test_a_kernel_that_does_not_compile_is_named(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kernel: Any, *numbers: int, **arguments: Any) -> None:
        raise ValueError("no such instruction")

    use("triton")
    monkeypatch.setattr("opt8bit.backends.triton.launches._warm_up", broken)
    param = nn.Parameter(torch.randn(64, 64, device=DEVICE))
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    optimizer = opt8bit.AdamW8bit([param])
    message = rf"kernels of adamw for torch.float32 do not compile for {DEVICE}.*: no such instruction"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(param, before) and not optimizer.state[param]


def test_devices_and_who_serves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPT8BIT_BACKEND", raising=False)
    assert available("mps") == available("meta") == ["reference"]
    assert available("cuda") == available("xpu:1") == ["triton", "reference"]
    assert backend_for("cuda").name == "triton" and backends.why("cuda") == "kernels in Triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_for("mps").name == "reference"


@pytest.mark.parametrize("module", ["None", "types.SimpleNamespace(__version__='3.3.1')"])
def test_without_triton_the_reference_serves_with_one_warning(module: str) -> None:
    code = (
        "import sys, types, warnings\n"
        f"sys.modules['triton'] = {module}\n"
        "from opt8bit import backends\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    assert [backends.backend_for('cuda').name for _ in range(3)] == ['reference'] * 3\n"
        "assert len(caught) == 1 and 'pip install triton' in str(caught[0].message), caught\n"
        "assert backends.available('cuda') == ['reference'] and 'pip install triton' in backends.why('cuda')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_leaves_triton_alone() -> None:
    code = "import sys, torch; had = 'triton' in sys.modules; import opt8bit; assert ('triton' in sys.modules) == had"
    subprocess.run([sys.executable, "-c", code], check=True)


TARGETS = {  # each with the rules that are compiled for it
    ("cuda", 90, 32): list(ONE_OF_EACH_RULE),
    ("cuda", 80, 32): ["adamw"],
    ("hip", "gfx942", 64): ["adamw", "lamb"],
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def test_steps_compile_and_launch(target: tuple[Any, ...], tmp_path: Path) -> None:
    """For GPUs that need not be there: what the interpreter takes, the compiler may not, nor how kernels are called."""
    script = Path(__file__).with_name("recording.py")
    triton_alone = {"OPT8BIT_BACKEND": "triton", "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    cases = [ONE_OF_EACH_RULE[rule] for rule in TARGETS[target]]
    command = [sys.executable, str(script), *map(str, target), *cases]
    subprocess.run(command, check=True, env={**os.environ, **triton_alone})
