"""``opt8bit report``: the page says what the folder records, stands by itself, and says what is not recorded."""

import json
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from small import WINDOWS

from opt8bit.cli.main import main
from opt8bit.cli.report.record import kind_of
from opt8bit.ptq.inspect import inspect, unpacked_weight
from opt8bit.ptq.model.source import Checkpoint
from opt8bit.recipe.runtimes import RUNTIMES

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:not every server runs")  # what is as small as here
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a page has: its text, its tags, all attributes; fails where tags are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.texts: list[tuple[str, str]] = []  # the element that a text is in, and the text
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.texts)

    def of(self, tag: str) -> list[str]:
        """The texts right in elements of this name."""
        return [text for inside, text in self.texts if inside == tag]


def compress(folder: Path, output: Path, *arguments: str) -> Path:
    texts = ["--calibration", str(folder / "text.txt"), "--output", str(output)]
    assert main(["compress", str(folder / "llama"), *texts, *WINDOWS, *arguments]) == 0
    return output


def reported(model: Path, page: Path) -> Page:
    assert main(["report", str(model), "--output", str(page)]) == 0
    return Page(page)


@pytest.fixture(scope="module")
def corrected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(folder, tmp_path_factory.mktemp("written") / "out", "--bias-correction", "sequential")


@pytest.fixture(scope="module")
def page(corrected: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return reported(corrected, tmp_path_factory.mktemp("pages") / "report.html")


def test_the_page_stands_by_itself(page: Page) -> None:
    assert page.tags["html"] == page.tags["body"] == page.tags["h1"] == 1
    assert not {"script", "link", "img", "iframe"} & page.tags.keys()
    assert not {"src", "href", "xlink:href"} & {name for _, name, _ in page.attributes}
    (style,) = page.of("style")
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes


def test_the_figures_are_those_of_the_report(page: Page, corrected: Path, folder: Path) -> None:
    report = json.loads((corrected / "opt8bit" / "report.json").read_text())
    quality = report["held_out"]
    figures = page.of("dd")
    assert figures[0] == f"{report['bits_per_weight']:.2f} bits"
    assert figures[2:] == [f"{quality['perplexity_compressed']:.3f}", f"{quality['kl_divergence']:.4f}"]
    size = {path: inspect(path).stored_bytes for path in (corrected, folder / "llama")}
    assert figures[1] == f"{size[corrected] / 1e6:,.1f} MB"
    ratio = size[corrected] / size[folder / "llama"]
    assert f"of tensors, {ratio:.0%} of the source's {size[folder / 'llama'] / 1e6:,.1f} MB" in page.of("dt")
    cells = page.of("td")
    for layer in report["layers"]:
        place = cells.index(layer["name"])
        errors = [f"{layer['error_rounded']:.4%}", f"{layer['error_corrected']:.4%}"]
        assert cells[place + 2 : place + 5] == [f"{layer['bits_per_weight']:.3f}", *errors]
    assert f"{quality['perplexity']:.4f}" in cells


def test_every_layer_has_its_bits_and_both_errors_in_the_charts(page: Page) -> None:
    layers = 14
    shown = Counter(value for tag, name, value in page.attributes if tag == "circle" and name == "class")
    assert shown == {"rounded": layers, "corrected": layers}
    titles = page.of("title")
    assert sum(title.endswith(" bits") and title.startswith("model.layers.") for title in titles) == layers
    kinds = [text for text in page.of("figcaption")]
    assert len(kinds) == layers // 2 and "mlp.down_proj" in kinds


def test_histograms_count_every_code(page: Page, corrected: Path) -> None:
    report = json.loads((corrected / "opt8bit" / "report.json").read_text())
    layers = sorted(report["layers"], key=lambda layer: layer["error_corrected"])
    codes = [text.split(": ") for text in page.of("title") if text.startswith("code ")]
    assert len(codes) == 3 * 16
    for i, layer in enumerate([layers[0], layers[7], layers[-1]]):
        found = [int(count.replace(",", "")) for _, count in codes[16 * i : 16 * i + 16]]
        weight = unpacked_weight(corrected, layer["name"])
        assert found == [int((weight.codes == code).sum()) for code in range(16)]
        assert sum(found) == layer["outputs"] * layer["inputs"]


@pytest.mark.parametrize("options", [(), ("--no-symmetric",), ("--bits", "3"), ("--format", "gptq")], ids=" ".join)
def test_unpacked_codes_are_the_weight(options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    out = compress(folder, tmp_path / "out", "--no-verify", *options)
    source = Checkpoint(out, unpack=True)
    for layer in inspect(out).layers:
        weight = unpacked_weight(out, layer)
        of_inputs = (weight.scale[:, weight.group], weight.zero_point[:, weight.group])
        values = (weight.codes.double() - of_inputs[1].double()) * of_inputs[0].double()
        assert torch.equal(values.float(), source.files.read([f"{layer}.weight"])[f"{layer}.weight"])
    with pytest.raises(ValueError, match=r"lm_head is not packed in"):
        unpacked_weight(out, "lm_head")


@pytest.mark.parametrize(("grid", "size"), [("nvfp4", "16"), ("mxfp4", "32")])
def test_floats_have_no_histograms(grid: str, size: str, folder: Path, tmp_path: Path) -> None:
    out = compress(folder, tmp_path / "out", "--grid", grid, "--group-size", size)
    page = reported(out, tmp_path / "page.html")
    assert not [text for text in page.of("h3") if ", error " in text] and grid in page.text


def test_the_run_is_recorded_and_the_recipe_repeats_it(page: Page, corrected: Path, folder: Path) -> None:
    run = json.loads((corrected / "opt8bit" / "run.json").read_text())
    assert run["calibration"] == str(folder / "text.txt") and run["seconds"] > 0
    assert run["verified"].startswith("loaded back: logits differ by")
    commands = page.of("code")
    (again,) = [text for text in commands if text.startswith("opt8bit compress ")]
    assert f"--calibration {folder / 'text.txt'} --recipe {corrected / 'opt8bit' / 'recipe.json'} " in again
    (recipe,) = [text for text in commands if text.startswith("{")]
    assert json.loads(recipe) == json.loads((corrected / "opt8bit" / "recipe.json").read_text())
    assert "Not recorded" not in page.text


def test_runtimes_get_a_command_or_a_reason(page: Page, corrected: Path) -> None:
    headings = page.of("h3")
    assert all(f"{name}: {runtime.title}" in headings for name, runtime in RUNTIMES.items())
    commands = page.of("code")
    assert commands.count(f"vllm serve {corrected}") == 2
    assert not [text for text in commands if "sglang" in text]  # which has no groups of 16
    assert re.search(r"SGLang 0\.5\.23 does not run 4 bits, symmetric, groups of 16: use groups of 32", page.text)
    assert sum(f"from_pretrained({str(corrected)!r})" in text for text in commands) == 2


def test_the_python_that_loads_it_runs(page: Page) -> None:
    names: dict[str, Any] = {}
    code = next(text for text in page.of("code") if text.startswith("from transformers"))
    exec(compile(code, "report.html", "exec", dont_inherit=True), names)
    assert names["model"](torch.tensor([[1, 2]])).logits.isfinite().all()


def test_what_is_not_recorded_is_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    out = compress(folder, tmp_path / "out", "--format", "dense", "--held-out", "0")
    (out / "opt8bit" / "run.json").unlink()
    (out / "opt8bit" / "source.json").unlink()
    page = reported(out, tmp_path / "report.html")
    missing = page.of("li")
    assert [text.partition(":")[0] for text in missing] == [
        "Perplexity and KL divergence",
        "The size of the source",
        "The calibration text, the time and the result of the check",
        "Codes and scales",
    ]
    headings = page.of("h2")
    assert "Quality" not in headings and "Codes and scales" not in headings
    assert len(page.of("dd")) == 2 and "the source, as it was read" not in page.of("td")
    assert "The recipe sets no biases." in page.text
    shown = {value for tag, name, value in page.attributes if tag == "circle" and name == "class"}
    assert shown == {"rounded"}
    assert sum("sglang" in text for text in page.of("code")) == 1  # everything runs a dense one


def test_names_and_numbers_of_any_kind_do_not_break_the_page(corrected: Path, tmp_path: Path) -> None:
    out = tmp_path / "a 'folder' & <more>"
    shutil.copytree(corrected, out)
    path = out / "opt8bit" / "report.json"
    report = json.loads(path.read_text())
    report["model"] = "<script>alert(1)</script> & $title"
    report["layers"][0] |= {"error_rounded": None, "error_corrected": 0.0, "note": "<b>"}
    report["held_out"]["perplexity_compressed"] = None
    path.write_text(json.dumps(report))
    page = reported(out, tmp_path / "report.html")
    assert page.tags["script"] == page.tags["b"] == 0
    assert page.of("h1") == [f"{report['model']} at {report['bits_per_weight']:.2f} bits a weight"]
    assert "nan" in page.of("dd")
    shown = Counter(value for tag, name, value in page.attributes if tag == "circle" and name == "class")
    assert shown == {"rounded": 13, "corrected": 13}
    assert not [value for _, _, value in page.attributes if "nan" in value or "inf" in value]


def test_a_later_correction_is_said(corrected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(corrected, out)
    (out / "opt8bit" / "correction.json").write_text("{}")
    assert "before opt8bit correct added biases" in reported(out, tmp_path / "report.html").text


def damage(out: Path, name: str, text: str | None) -> None:
    path = out / name
    path.unlink() if text is None else path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("opt8bit/report.json", None, r"has no opt8bit/report\.json, which opt8bit compress writes"),
        ("opt8bit/report.json", "[", r"report\.json is damaged"),
        ("opt8bit/report.json", "[]", r"report\.json is damaged"),
        ("opt8bit/report.json", "{}", r"report\.json is damaged: KeyError\('held_out'\)"),
        ("opt8bit/run.json", "[]", r"run\.json is damaged: it has list, an object was expected"),
        ("opt8bit/source.json", "{}", r"source\.json is damaged"),
        ("config.json", None, r"config\.json is missing or damaged"),
        ("model.safetensors", None, "has neither model.safetensors nor"),
        ("model.safetensors", "x", "model.safetensors is missing or damaged"),
    ],
)
def test_other_folders_are_refused(
    name: str,
    text: str | None,
    message: str,
    corrected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(corrected, tmp_path / "out")
    damage(tmp_path / "out", name, text)
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "report.html")]) == 2
    assert re.search(f"^opt8bit report: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def test_outputs_that_cannot_be_written_are_refused(
    corrected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").write_text("mine")
    for output, message in (
        (tmp_path / "report.html", "exists: give the name of a file that does not"),
        (tmp_path / "none" / "report.html", f"{tmp_path / 'none'} is not a folder"),
    ):
        assert main(["report", str(corrected), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"
    assert main(["report", str(tmp_path / "none"), "--output", str(tmp_path / "new.html")]) == 2
    assert f"{tmp_path / 'none'} is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.down_proj", "mlp.down_proj"),
        ("gpt2.h.11.attn.c_attn", "attn.c_attn"),
        ("model.layers.0.mlp.experts.17.w1", "mlp.experts.*.w1"),
        ("encoder.proj", "encoder.proj"),
    ],
)
def test_layers_of_one_kind_differ_in_numbers_only(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_biases_and_widths_of_single_layers_are_seen(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    overrides = [{"layers": "*.down_proj", "bits": 8, "group_size": 32}, {"layers": "*.o_proj", "skip": True}]
    recipe.write_text(json.dumps({"symmetric": True, "overrides": overrides}))
    page = reported(compress(folder, tmp_path / "out", "--recipe", str(recipe)), tmp_path / "report.html")
    cells = page.of("td")
    widths = {kind: cells[cells.index(kind) + 3] for kind in ("mlp.down_proj", "mlp.up_proj")}
    assert widths == {"mlp.down_proj": "9.00", "mlp.up_proj": "6.00"}
    assert "self_attn.o_proj" not in cells
    shades = {float(value) for tag, name, value in page.attributes if name == "fill-opacity"}
    assert {round(shade, 3) for shade in shades} == {round(6 / 9, 3), 1.0} and math.isclose(max(shades), 1.0)
