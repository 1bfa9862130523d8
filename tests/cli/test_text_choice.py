"""Windows to calibrate on: the first ones, or drawn by a seed from all of a text."""

import json
import os
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import SMALL
from torch import Tensor

from opt8bit.cli.errors import CommandError
from opt8bit.cli.main import main
from opt8bit.cli.texts import choice, choose_windows, find_text, first_windows, lacks_bos, prefix

LENGTH, SAMPLES, HELD_OUT = 16, 8, 2


class Numbers:
    """Tokenizes numbers as themselves, and counts the characters it has seen."""

    seen = 0

    def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
        self.seen += len(text)
        return {"input_ids": [int(word) for word in re.findall(r"\d+", text)]}


def choose(path: Path, seed: int, tokenizer: Any = None) -> tuple[Tensor, Tensor | None]:
    tokenizer = tokenizer or Numbers()
    return choose_windows(find_text(str(path)), tokenizer, length=LENGTH, samples=SAMPLES, held_out=HELD_OUT, seed=seed)


def numbers(path: Path, count: int) -> Path:
    """A text of numbers that rise, all of seven digits, so that a window's tokens tell where it is from."""
    path.write_text(" ".join(str(10**6 + i) for i in range(count)))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of some thousand characters are long."""
    monkeypatch.setattr(choice, "SMALL", 2000)
    for module in (choice, prefix):
        monkeypatch.setattr(module, "FIRST", 1000)


def test_without_a_seed_the_first_windows_are_taken(tmp_path: Path) -> None:
    samples, held_out = choose(numbers(tmp_path / "a.txt", 50_000), 0)
    expected = 10**6 + torch.arange((SAMPLES + HELD_OUT) * LENGTH).view(-1, LENGTH)
    assert held_out is not None and torch.equal(torch.cat([samples, held_out]), expected)
    text = find_text(str(tmp_path / "a.txt"))
    assert torch.equal(first_windows(text, Numbers(), LENGTH, SAMPLES), samples)


class Beginning(Numbers):
    """Puts a token before each text."""

    bos_token_id, bos_token = 7, "<bos>"

    def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id, *super().__call__(text, verbose=verbose)["input_ids"]]}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [200, 50_000])
def test_each_window_begins_with_the_token_that_begins_a_text(
    count: int, seed: int, tmp_path: Path, small: None
) -> None:
    text = find_text(str(numbers(tmp_path / "a.txt", count)))
    sizes: dict[str, Any] = {"length": LENGTH, "samples": 4, "held_out": 2}
    plain = choose_windows(text, Beginning(), seed=seed, **sizes)
    found = choose_windows(text, Beginning(), seed=seed, bos=True, **sizes)
    for ids, begun in zip(plain, found, strict=True):
        assert ids is not None and begun is not None
        assert (begun[:, 0] == 7).all() and (ids[:, 0] == 7).sum() <= 1 and torch.equal(begun[:, 1:], ids[:, 1:])
    if not seed:
        assert torch.equal(first_windows(text, Beginning(), LENGTH, 4, bos=True), found[0])
    for tokenizer in (Numbers(), type("Without", (Numbers,), {"bos_token_id": None})()):
        with pytest.raises(CommandError, match="the tokenizer has no token that begins a text"):
            choose_windows(text, tokenizer, seed=seed, bos=True, **sizes)


def test_it_is_said_where_windows_lack_the_token_that_begins_a_text() -> None:
    assert lacks_bos(Beginning()) == "the model expects <bos> before a text: with --bos, each window begins with it"
    assert lacks_bos(Numbers()) is None
    assert lacks_bos(type("Unused", (Numbers,), {"bos_token_id": 7})()) is None


@pytest.mark.parametrize("left", [0, 1])
def test_what_is_left_of_a_short_text_is_held_out(left: int, tmp_path: Path) -> None:
    path = numbers(tmp_path / "a.txt", (SAMPLES + left) * LENGTH + 3)
    for seed in (0, 1):
        samples, held_out = choose(path, seed)
        assert len(samples) == SAMPLES and left == (0 if held_out is None else len(held_out))
        numbers(path, SAMPLES * LENGTH - 1)
        with pytest.raises(CommandError, match=r"a\.txt: 8 samples of 16 tokens take 128, it has 127"):
            choose(path, seed)
        numbers(path, (SAMPLES + left) * LENGTH + 3)


def test_windows_of_a_short_text_are_permuted(tmp_path: Path) -> None:
    path = numbers(tmp_path / "a.txt", 1000)
    samples, held_out = choose(path, 5)
    every = 10**6 + torch.arange(1000 // LENGTH * LENGTH).view(-1, LENGTH)
    expected = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(5))][: SAMPLES + HELD_OUT]
    assert held_out is not None and torch.equal(torch.cat([samples, held_out]), expected)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_windows_of_a_long_text_are_drawn_from_all_of_it(suffix: str, tmp_path: Path, small: None) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        numbers(path, 20_000)
    else:
        path.write_text("".join(json.dumps({"text": str(10**6 + i)}) + "\n" for i in range(20_000)))
    starts = []
    for seed in range(1, 9):
        tokenizer = Numbers()
        samples, held_out = choose(path, seed, tokenizer)
        assert held_out is not None and (len(samples), len(held_out)) == (SAMPLES, HELD_OUT)
        windows = torch.cat([samples, held_out])
        assert bool((windows.diff() == 1).all())  # each is a piece of the text
        assert len(windows.unique()) == windows.numel()  # and no two overlap
        again = choose(path, seed)
        assert torch.equal(again[0], samples) and again[1] is not None and torch.equal(again[1], held_out)
        assert tokenizer.seen < 160_000 / 4
        starts.append(windows[:, 0] - 10**6)
    assert len({tuple(start.tolist()) for start in starts}) == len(starts)
    drawn = torch.cat(starts)
    assert drawn.min() < 2500 and drawn.max() > 17_500
    assert 8000 < drawn.float().mean() < 12_000  # of 80 even ones, 10,000 ± 650
    assert any(bool((start.diff() < 0).any()) for start in starts)  # what is held out is not what comes last


def test_blocks_grow_where_a_token_has_more_characters(tmp_path: Path, small: None) -> None:
    start = " ".join(str(10**6 + i) for i in range(125))
    rest = (" " * 50).join(str(10**6 + i) for i in range(125, 9000))
    (tmp_path / "a.txt").write_text(f"{start} {rest}")
    tokenizer = Numbers()
    samples, _ = choose(tmp_path / "a.txt", 1, tokenizer)
    assert bool((samples.diff() == 1).all()) and samples.max() > 10**6 + 5000
    assert tokenizer.seen < len(rest)


def test_a_text_with_too_few_blocks_is_permuted(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbers(tmp_path / "a.txt", 600)
    long = choose(path, 3)
    monkeypatch.undo()
    assert torch.equal(choose(path, 3)[0], long[0])


def test_a_pipe_is_read_once(tmp_path: Path, small: None) -> None:
    path, pipe = numbers(tmp_path / "a.txt", 20_000), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(path.read_text()))
    writer.start()
    samples, _ = choose(pipe, 3)
    writer.join()
    every = 10**6 + torch.arange(20_000).view(-1, LENGTH)
    assert torch.equal(samples, every[torch.randperm(len(every), generator=torch.Generator().manual_seed(3))][:SAMPLES])


def test_of_a_data_set_not_all_is_downloaded(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def rows(*args: object, **options: object) -> Any:
        nonlocal asked
        for asked in range(100_000):
            yield {"text": str(10**6 + asked)}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=rows))
    monkeypatch.setattr(choice, "REMOTE", 90_000)
    samples, _ = choose(Path("owner/name"), 3)
    assert 5000 < samples.max() - 10**6 < 10_000 < asked + 1000 < 12_000


def test_commands_take_records(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "text.txt").read_text()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": text}))
    shown = []
    for arguments in (
        ["--text", str(folder / "text.txt")],
        ["--text", str(tmp_path / "rows.jsonl"), "--text-column=body"],
    ):
        options = ["--sequence-length", "16", "--samples", "5", "--json"]
        assert main(["evaluate", str(folder / "llama"), *arguments, *options]) == 0
        shown.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert shown[0] == shown[1]
    output = ["--output", str(tmp_path / "out"), "--no-verify", "--method", "rtn", *SMALL]
    calibration = ["--calibration", str(tmp_path / "rows.jsonl"), "--text-column", "body"]
    assert main(["compress", str(folder / "llama"), *calibration, *output]) == 0
    recipe = json.loads((tmp_path / "out" / "opt8bit" / "recipe.json").read_text())
    assert not {"text_column", "calibration"} & recipe.keys()
