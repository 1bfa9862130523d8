"""Each warning points at the line of the user's that led to it."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

import opt8bit
from opt8bit import backends
from opt8bit.backends import description, native
from opt8bit.ptq.rounding import RTN
from opt8bit.quant import dynamic_map, quantize_blockwise
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import WeightScheme


def optimizer() -> opt8bit.AdamW8bit:
    param = nn.Parameter(torch.ones(64, 64))
    param.grad = torch.ones(64, 64)
    return opt8bit.AdamW8bit([param])


def steps() -> None:
    optimizer().step()


def steps_under_a_schedule() -> None:
    scheduled = optimizer()
    torch.optim.lr_scheduler.ConstantLR(scheduled)  # which wraps step once more
    scheduled.step()


def scales() -> None:
    scaler = torch.amp.GradScaler("cpu")
    loss = nn.Parameter(torch.ones(64, 64))
    scaled = opt8bit.AdamW8bit([loss])
    scaler.scale(loss.sum()).backward()
    scaler.step(scaled)


def goes_backward() -> None:
    param = nn.Parameter(torch.ones(64, 64))
    kept = opt8bit.AdamW8bit([param], offload="backward")
    param.sum().backward()  # in which the step is taken
    kept.step()


def quantizes() -> None:
    quantize_blockwise(torch.ones(64, 64), dynamic_map(signed=True), 256)


def rounds() -> None:
    RTN().round(torch.ones(4, 16), torch.ones(4, 16), WeightScheme(UniformGrid(4), None))  # type: ignore[arg-type]


USES = (steps, steps_under_a_schedule, scales, goes_backward, quantizes, rounds)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_missing_kernels_are_told_where_they_are_missed(
    use: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPT8BIT_BACKEND", raising=False)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(description, "_torch_functions", lambda: None)  # which remembers a library that there was
    backends._warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no compiled kernels") as told:
            use()
    finally:
        backends._warn_once.cache_clear()
    lines, first = inspect.getsourcelines(use)
    assert len(told) == 1 and told[0].filename == __file__
    assert first < told[0].lineno < first + len(lines)


def test_every_warning_is_given_so() -> None:
    """``warnings.warn`` points at a line that its caller has counted out, rightly or not."""
    package = backends.native.FOLDER.parent
    callers = [path for path in package.rglob("*.py") if "warnings.warn(" in path.read_text()]
    assert callers == [package / "warning.py"]
