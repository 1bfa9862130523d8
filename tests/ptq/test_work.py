"""Runs that were ended go on from their last finished block, to the same bits; what has changed is noticed."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import MODELS, assert_same_changes, token_ids

from opt8bit import ptq
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.quant import CodebookGrid, normal_float


class Ended(Exception):
    pass


def ending_after(layers: int) -> Any:
    seen: list[str] = []

    def see(report: LayerReport, count: int) -> None:
        seen.append(report.name)
        if len(seen) == layers:
            raise Ended

    return see


OPTIONS: dict[str, Any] = {"bits": 3, "group_size": 16, "bias_correction": "sequential", "held_out": token_ids(2)}


@pytest.mark.parametrize("layers", [1, 7, 8, 13])
@pytest.mark.parametrize("method", [ptq.GPTQ(), ptq.OutlierQuantEase(0.05, "column")], ids=str)
def test_an_ended_run_goes_on(layers: int, method: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "method": method}
    expected = ptq.compress(MODELS["llama"](), token_ids(), **options)
    with pytest.raises(Ended):
        ptq.compress(MODELS["llama"](), token_ids(), **options, work=tmp_path, see=ending_after(layers))
    reports: list[LayerReport] = []
    result = ptq.compress(
        MODELS["llama"](), token_ids(), **options, work=tmp_path, see=lambda report, count: reports.append(report)
    )
    assert [report.name for report in reports] == [report.name for report in expected.report]
    assert result.report == reports and result.quality == expected.quality
    assert result.probe is not None and expected.probe is not None
    assert torch.equal(result.probe.logits, expected.probe.logits)
    assert_same_changes(result, expected)


def test_finished_blocks_are_not_done_again(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        ptq.compress(MODELS["llama"](), token_ids(), **OPTIONS, work=tmp_path, see=ending_after(8))
    before = (tmp_path / "block-00000.safetensors").stat().st_mtime_ns
    ptq.compress(MODELS["llama"](), token_ids(), **OPTIONS, work=tmp_path)
    assert (tmp_path / "block-00000.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "manifest.json",
        "streams-0.2.safetensors",
    ]


def test_another_codebook_or_configuration_is_noticed(tmp_path: Path) -> None:
    options = {"grid": CodebookGrid(normal_float(3)), "group_size": 16}
    with pytest.raises(Ended):
        ptq.compress(MODELS["llama"](), token_ids(), **options, work=tmp_path, see=ending_after(8))
    other = {**options, "grid": CodebookGrid(torch.linspace(-1, 1, 8))}
    with pytest.raises(ValueError, match="differs in: options"):
        ptq.compress(MODELS["llama"](), token_ids(), **other, work=tmp_path)
    model: Any = MODELS["llama"]()
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(ValueError, match="differs in: model"):
        ptq.compress(model, token_ids(), **options, work=tmp_path)


def test_another_version_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Ended):
        ptq.compress(MODELS["llama"](), token_ids(), **OPTIONS, work=tmp_path, see=ending_after(8))
    monkeypatch.setattr(importlib.import_module("opt8bit.ptq.compress"), "version", lambda package: "0.0.1")
    with pytest.raises(ValueError, match="differs in: version"):
        ptq.compress(MODELS["llama"](), token_ids(), **OPTIONS, work=tmp_path)


@pytest.mark.parametrize("damage", ["", "[]"])
def test_a_damaged_manifest_is_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ptq.compress(MODELS["llama"](), token_ids(), **OPTIONS, work=tmp_path)


def test_what_has_changed_is_named(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        ptq.compress(MODELS["llama"](), token_ids(), **OPTIONS, work=tmp_path, see=ending_after(8))
    other: Any = MODELS["llama"]()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    for model, ids, options, message in (
        (MODELS["llama"](), token_ids(), {**OPTIONS, "bits": 4}, "differs in: options"),
        (other, token_ids(), OPTIONS, "differs in: model"),
        (MODELS["llama"](), token_ids().flip(0), OPTIONS, "differs in: calibration text"),
        (MODELS["llama"](), token_ids(), {**OPTIONS, "held_out": token_ids(3)}, "differs in: held-out text"),
        (other, token_ids(), {**OPTIONS, "overrides": {"*.q_proj": None}}, "differs in: model, options"),
    ):
        with pytest.raises(ValueError, match=message):
            ptq.compress(model, ids, **options, work=tmp_path)
    ptq.compress(MODELS["llama"](), token_ids(), **OPTIONS, work=tmp_path)
