"""What is said, and refused, before a run for which the machine has too little memory."""

from pathlib import Path
from typing import Any

import pytest
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq import need
from opt8bit.ptq.model import memory
from opt8bit.ptq.plan import plan_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RECIPE = ptq.Recipe(method=ptq.GPTQ(), group_size=16, error_propagation=0.0)


def has(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    for module in (memory, need):
        monkeypatch.setattr(module, "machine_memory", lambda: size)


def test_the_estimate_is_the_sum_of_what_is_held() -> None:
    model, batch = MODELS["llama"](), {"input_ids": token_ids(4, 16)}
    plan = plan_for(model, RECIPE)
    found = need.need(model, [batch], plan, in_memory=False)
    # Two heads of 96 × 32 and a norm are outside; a block has 9,216 weights in linear layers, and two norms.
    assert found.model == 4 * (2 * 96 * 32 + 32) and found.block == 2 * 4 * (9216 + 64)
    assert need.need(model, [batch] * 3, plan, in_memory=False).hidden == 3 * found.hidden
    assert found.hidden == 4 * 16 * 4 * (2 * (4 * 32 + 64) + 16)
    whole = need.need(model, [batch], plan, in_memory=True)
    assert whole.model == found.model + found.block and whole.block == found.block // 2
    assert found.total == need.LIBRARIES + sum(found)


def test_a_run_that_does_not_fit_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    has(monkeypatch, 3e8)
    with pytest.warns(
        UserWarning, match="this run takes about 0.4 GB of memory, and the machine has 0.3 GB: "
    ) as caught:
        ptq.compress(MODELS["llama"](), token_ids(), group_size=16, see=lambda report, count: begun.append(len(caught)))
    assert begun == [1] * 14
    message = str(caught[0].message)
    assert "hidden states, which fewer windows of the calibration text, or shorter ones, make less" in message
    assert "--samples, --held-out, --sequence-length" in message


def test_nothing_is_said_of_a_run_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 5e8)
    ptq.compress(MODELS["llama"](), token_ids(), group_size=16)


def test_a_model_of_which_no_block_fits_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model: Any = MODELS["llama"]()
    model.save_pretrained(tmp_path / "model")
    read: list[str] = []
    monkeypatch.setattr(ptq.Checkpoint, "load", lambda self, model, names: read.extend(names))
    has(monkeypatch, 50_000)
    message = r"memory of 0\.05 MB does not hold the embeddings and the head, 0\.0247 MB, and one block, 0\.0371 MB"
    with pytest.raises(ValueError, match=message):
        ptq.Checkpoint(tmp_path / "model")
    assert read == []
    has(monkeypatch, 62_000)
    ptq.Checkpoint(tmp_path / "model")
    assert read


@pytest.mark.parametrize(("limit", "expected"), [("1000000\n", 1e6), ("max\n", None), (None, None)])
def test_the_memory_of_a_container_is_what_it_may_have(
    limit: str | None, expected: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(memory, "CGROUP", ())
    physical = memory.machine_memory()
    assert 1e8 < physical
    monkeypatch.setattr(memory, "CGROUP", (tmp_path / "memory.max",))
    assert memory.machine_memory() == (physical if expected is None else expected)
