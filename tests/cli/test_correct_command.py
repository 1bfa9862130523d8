"""``opt8bit correct``: biases for checkpoints that other tools have quantized, and nothing else changed in them."""

import copy
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import KINDS, ct_header, group_header, moved_scales, rounded, write_packed
from safetensors.torch import load_file, save_file
from small import loaded
from torch import Tensor
from torch.nn.functional import kl_div
from toys import MODELS, shaken

from opt8bit.cli import correct as command
from opt8bit.cli.main import main
from opt8bit.ptq.corrected_checkpoint import verification as corrected_verification
from opt8bit.ptq.model.tensor_files import raw_header

verification = importlib.import_module("opt8bit.ptq.verify")  # the function of that name hides it in its package
TEXT = ["--samples", "48", "--sequence-length", "24", "--held-out", "6"]
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a tokenizer of one token per number, and a text whose words are not all as frequent."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(models.WordLevel({f"{number}": number for number in range(96)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    for name in ("llama", "opt", "qwen2", "qwen3", "mistral"):
        shaken(MODELS[name]()).save_pretrained(path / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path / name)
    (path / "text.txt").write_text(" ".join(map(str, tokens(1600, seed=0).tolist())))
    return path


def tokens(count: int, seed: int) -> Tensor:
    weights = 1 / torch.arange(1.0, 97)
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def packed(place: Path, path: Path, kind: str = "awq", model: str = "llama", shards: int = 1) -> dict[str, Tensor]:
    values = write_packed(place / model, path, KINDS[kind], shards)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(place / model / name, path / name)
    return values


def run(place: Path, checkpoint: Path, output: Path, *more: str, model: str = "llama") -> int:
    reference = ["--reference", str(place / model), "--calibration", str(place / "text.txt")]
    return main(["correct", str(checkpoint), *reference, "--output", str(output), *TEXT, *more])


def raw_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of each tensor, and the file's own words for none of them."""
    found = {}
    for file in folder.glob("*.safetensors"):
        header, start = raw_header(file)
        data = file.read_bytes()[start:]
        for name, about in header.items():
            if name != "__metadata__":
                first, end = about["data_offsets"]
                found[name] = (about["dtype"], about["shape"], data[first:end])
    return found


def kept(folder: Path) -> list[str]:
    """The layers whose corrections the record says are kept."""
    record = json.loads((folder / "opt8bit" / "correction.json").read_text())
    names = [module["name"] for module in record["modules"] if module["is_kept"]]
    assert names
    return names


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def built(folder: Path, values: dict[str, Tensor], biases: bool = True) -> Any:
    """A model of the class that the configuration names, with weights and all biases that the files have."""
    import transformers

    config = config_of(folder)
    del config["quantization_config"]
    made = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
    own = {name: tensor for name, tensor in tensors_of(folder).items() if name.endswith(".bias")}
    if not biases:
        own = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    missing, unexpected = made.load_state_dict({**values, **own}, strict=False)
    assert not unexpected and not set(missing) - {"lm_head.weight"}
    made.tie_weights()
    return made.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def divergence(model: Any, reference: Any) -> float:
    ids = tokens(40 * 24, seed=7).view(40, 24)
    ours, exact = (each(input_ids=ids).logits.float().log_softmax(-1) for each in (model, reference))
    return float(kl_div(ours, exact, reduction="sum", log_target=True)) / ids.numel()


@torch.no_grad()
def assert_computes_its_probe(model: Any, folder: Path) -> None:
    probe = load_file(folder / "opt8bit" / "probe.safetensors")
    found = model(input_ids=probe["input_ids"]).logits[0, -len(probe["logits"]) :]
    torch.testing.assert_close(found, probe["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_added_and_nothing_else_changes(
    kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = packed(place, tmp_path / "packed", kind)
    before = raw_tensors(tmp_path / "packed")
    assert run(place, tmp_path / "packed", tmp_path / "out") == 0
    after, printed = raw_tensors(tmp_path / "out"), capsys.readouterr().out
    assert {name: after[name] for name in before} == before
    added = after.keys() - before.keys()
    expected = {f"model.layers.{i}.self_attn.{name}.bias" for i in range(2) for name in ATTENTION}
    assert added == expected | {f"model.layers.{i}.mlp.{name}.bias" for i in range(2) for name in MLP}
    config = config_of(tmp_path / "packed")
    assert config_of(tmp_path / "out") == {**config, "attention_bias": True, "mlp_bias": True}
    for name in ("quantize_config.json", "notes/README.md", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    assert raw_header(tmp_path / "out" / "model.safetensors")[0]["__metadata__"]["made_by"] == "a test"
    biases = {name: tensor for name, tensor in tensors_of(tmp_path / "out").items() if name in added}
    assert not any(biases[name].any() for name in added if "k_proj" in name)
    assert {name for name in added if biases[name].any()} == {f"{name}.bias" for name in kept(tmp_path / "out")}
    corrected, reference = built(tmp_path / "out", values), loaded(place / "llama")
    assert_computes_its_probe(corrected, tmp_path / "out")
    assert divergence(corrected, reference) < 0.9 * divergence(built(tmp_path / "out", values, False), reference)
    assert "switched on in config.json: attention_bias, mlp_bias" in printed
    assert "not corrected: 2 layers, model.layers.0.self_attn.k_proj first: a constant in the keys" in printed
    served = sum(name.endswith(MLP) for name in kept(tmp_path / "out"))
    assert f"of {served} layers: SGLang 0.5.23 loads this bias and does not use it" in printed
    assert ("loaded back" if kind == "compressed-tensors" else "transformers has not loaded it: ") in printed
    assert "KL divergence from the reference on the held-out text: " in printed


def test_transformers_loads_the_biases(place: Path, tmp_path: Path) -> None:
    values = packed(place, tmp_path / "packed", "compressed-tensors")
    assert run(place, tmp_path / "packed", tmp_path / "out") == 0
    from transformers import AutoModelForCausalLM

    model: Any
    model, about = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)  # type: ignore[misc]
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    names = kept(tmp_path / "out")
    for name in names:
        assert torch.equal(model.get_submodule(name).bias, tensors_of(tmp_path / "out")[f"{name}.bias"])
    assert_computes_its_probe(model, tmp_path / "out")
    ids = tokens(24, seed=5)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, built(tmp_path / "out", values)(ids).logits)
    assert main(["verify", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.down_proj.bias"] += 1
    save_file(state, path, metadata={"format": "pt"})
    assert main(["verify", str(tmp_path / "out")]) == 2


def test_orders_and_statistics(place: Path, tmp_path: Path) -> None:
    packed(place, tmp_path / "packed", "gptq")
    found: list[Tensor] = []
    for order in ("local", "sequential"):
        for statistic in ("mean", "median"):
            out = tmp_path / f"{order}-{statistic}"
            assert run(place, tmp_path / "packed", out, "--order", order, "--statistic", statistic, "--no-verify") == 0
            record = json.loads((out / "opt8bit" / "correction.json").read_text())
            assert (record["order"], record["statistic"]) == (order, statistic)
            assert record["held_out"]["after"] < record["held_out"]["before"]
            biases = {name: tensor for name, tensor in tensors_of(out).items() if name.endswith(".bias")}
            found.append(torch.cat([biases[name] for name in sorted(biases)]))
    assert not any(torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])


def test_a_corrected_checkpoint_is_refused_unless_asked_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = packed(place, tmp_path / "packed", "gptq")
    assert run(place, tmp_path / "packed", tmp_path / "once") == 0
    shutil.copytree(tmp_path / "once", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "opt8bit")
    had = sorted(tmp_path.rglob("*"))
    for name, why in (
        ("once", "it has opt8bit/correction.json"),
        ("bare", "it has biases where the reference has none"),
    ):
        assert run(place, tmp_path / name, tmp_path / "twice") == 2
        message = capsys.readouterr().err
        assert f"the checkpoint is corrected already, {why}" in message and "--again" in message
    assert sorted(tmp_path.rglob("*")) == had
    again = run(place, tmp_path / "once", tmp_path / "twice", "--again", "--held-out", "0", "--order", "sequential")
    assert again == 0
    before, after = raw_tensors(tmp_path / "once"), raw_tensors(tmp_path / "twice")
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if not name.endswith(".bias"))
    assert (tmp_path / "twice" / "config.json").read_bytes() == (tmp_path / "once" / "config.json").read_bytes()
    assert_computes_its_probe(built(tmp_path / "twice", values), tmp_path / "twice")


@pytest.mark.filterwarnings("ignore:not every server runs:UserWarning")
def test_what_compress_has_corrected_is_corrected_already(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--calibration", str(place / "text.txt"), *TEXT, "--group-size", "16", "--method", "rtn"]
    compress = ["compress", str(place / "llama"), *arguments, "--no-verify", "--bits", "2", "--output"]
    assert main([*compress, str(tmp_path / "plain"), "--bias-correction", "none"]) == 0
    assert main([*compress, str(tmp_path / "corrected"), "--bias-correction", "sequential"]) == 0
    assert run(place, tmp_path / "corrected", tmp_path / "out") == 2
    assert "corrected already, opt8bit compress has corrected model.layers.0." in capsys.readouterr().err
    assert run(place, tmp_path / "plain", tmp_path / "out") == 0
    for name in ("report.json", "recipe.json"):
        own = Path("opt8bit") / name
        assert (tmp_path / "out" / own).read_bytes() == (tmp_path / "plain" / own).read_bytes()
    assert not (tmp_path / "out" / "opt8bit" / "report.html").exists()  # which would be out of date


def test_a_bias_that_is_there_is_raised_in_its_own_dtype(place: Path, tmp_path: Path) -> None:
    values = packed(place, tmp_path / "packed", "gptq", "opt")
    path = tmp_path / "packed" / "model.safetensors"
    state = {name: tensor.half() if name.endswith("bias") else tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    before = raw_tensors(tmp_path / "packed")
    assert run(place, tmp_path / "packed", tmp_path / "out", model="opt") == 0
    after = raw_tensors(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and changed and all(name.endswith(".bias") for name in changed)
    assert {after[name][0] for name in changed} == {"F16"} and not any("k_proj" in name for name in changed)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "packed" / "config.json").read_bytes()
    assert_computes_its_probe(built(tmp_path / "out", values), tmp_path / "out")


def test_layers_without_a_place_are_named_and_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(place, tmp_path / "three", "awq", "qwen3")
    assert run(place, tmp_path / "three", tmp_path / "out", model="qwen3") == 0
    printed = capsys.readouterr().out
    assert "not corrected: 6 layers, model.layers.0.mlp.gate_proj first: the checkpoint has no place for" in printed
    added = raw_tensors(tmp_path / "out").keys() - raw_tensors(tmp_path / "three").keys()
    assert added == {f"model.layers.{i}.self_attn.{name}.bias" for i in range(2) for name in ATTENTION}
    unused = sum(name.endswith("o_proj") for name in kept(tmp_path / "out"))
    assert (f"of {unused} layers: vLLM 0.33.0 loads this bias and does not use it" in printed) == bool(unused)
    packed(place, tmp_path / "two", "awq", "qwen2")
    assert run(place, tmp_path / "two", tmp_path / "own", model="qwen2") == 0
    printed = capsys.readouterr().out
    assert "no place for a bias here, only mlp_bias of LlamaForCausalLM has, and the class stays as it is" in printed
    assert raw_tensors(tmp_path / "own").keys() == raw_tensors(tmp_path / "two").keys()
    packed(place, tmp_path / "none", "awq", "mistral")
    assert run(place, tmp_path / "none", tmp_path / "nothing", model="mistral") == 2
    assert "no layer of the checkpoint can be corrected: model.layers.0.self_attn.q_proj: " in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_codes_in_fp8_keep_their_bytes(
    rounds_inputs: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Tensor] = {}
    base = load_file(place / "llama" / "model.safetensors")
    for name, tensor in base.items():
        if ".layers." in name and tensor.dim() == 2:
            state[f"{name}_scale"] = tensor.abs().amax(1, keepdim=True) / 2
            state[name] = (tensor / state[f"{name}_scale"]).round().to(torch.float8_e4m3fn)
        else:
            state[name] = tensor
    group = group_header(8, True)
    group["input_activations"] = {"num_bits": 8, "type": "float"} if rounds_inputs else None
    group["weights"] |= {"type": "float", "strategy": "channel", "group_size": None}
    (tmp_path / "fp8").mkdir()
    save_file(state, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    config = {**config_of(place / "llama"), "quantization_config": ct_header(group) | {"format": "naive-quantized"}}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    assert run(place, tmp_path / "fp8", tmp_path / "out") == 0
    before, after = raw_tensors(tmp_path / "fp8"), raw_tensors(tmp_path / "out")
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 14
    printed = capsys.readouterr().out
    assert ("it would round the inputs of layers, too" in printed) == rounds_inputs
    assert ("loaded back" in printed) != rounds_inputs


def test_what_transformers_never_loads_is_read_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(place, tmp_path / "packed", "compressed-tensors")

    def refused(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(verification, "_loaded", refused)
    assert run(place, tmp_path / "packed", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "read back: logits differ by" in printed and "out.partial: no such kernel" in printed
    monkeypatch.setattr(corrected_verification, "loads", lambda *_, **__: True)  # the source, though
    assert run(place, tmp_path / "packed", tmp_path / "other") == 2
    assert "no such kernel" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_shards_keep_their_tensors(place: Path, tmp_path: Path) -> None:
    values = packed(place, tmp_path / "packed", "gptq", shards=3)
    name = "model.safetensors.index.json"
    assert run(place, tmp_path / "packed", tmp_path / "out") == 0
    before, after = (json.loads((tmp_path / folder / name).read_text()) for folder in ("packed", "out"))
    assert before["weight_map"].items() <= after["weight_map"].items()
    for tensor in after["weight_map"].keys() - before["weight_map"].keys():
        codes = tensor.replace(".bias", ".qweight")
        assert after["weight_map"][tensor] == before["weight_map"][codes]
    for file in set(after["weight_map"].values()):
        inside = {tensor for tensor, other in after["weight_map"].items() if other == file}
        assert load_file(tmp_path / "out" / file).keys() == inside
    total = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert after["metadata"]["total_size"] == total > before["metadata"]["total_size"]
    assert_computes_its_probe(built(tmp_path / "out", values), tmp_path / "out")


def test_unused_zeros_of_old_tools_make_place(place: Path, tmp_path: Path) -> None:
    packed(place, tmp_path / "packed", "gptq")
    path = tmp_path / "packed" / "model.safetensors"
    state = load_file(path)
    state |= {
        name.replace("qweight", "bias"): torch.zeros(w.shape[1]) for name, w in state.items() if "qweight" in name
    }
    save_file(state, path, metadata={"format": "pt"})
    assert run(place, tmp_path / "packed", tmp_path / "out") == 0
    before, after = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and bool(after["model.layers.0.mlp.down_proj.bias"].any())


def test_without_held_out_text_everything_is_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(place, tmp_path / "packed", "gptq")
    assert run(place, tmp_path / "packed", tmp_path / "out", "--held-out", "0", "--no-verify") == 0
    printed = capsys.readouterr().out
    assert "all corrections are kept: no text is held out to choose by" in printed and "not verified" in printed


def shrink(path: Path) -> None:
    config = config_of(path)
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))


def relabel(path: Path) -> None:
    config = config_of(path)
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (path / "config.json").write_text(json.dumps(config))


def shuffle(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.qweight"
    state[name] = torch.randint(-(2**31), 2**31, state[name].shape, generator=torch.Generator().manual_seed(0)).int()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def lose(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.scales"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (None, ["--reference", "/no/such"], "there is no folder '/no/such'"),
        (None, ["--calibration", "/no/such"], "cannot read '/no/such'"),
        (None, ["--samples", "4000"], "4000 samples of 24 tokens take 96,000, it has 1,600"),
        (shrink, [], "gate_proj.weight is (32, 32) in the checkpoint, (64, 32) in the reference"),
        (relabel, [], "the weights are quantized by bitsandbytes: only the layouts of compressed-tensors, gptq, awq"),
        (shuffle, [], "weights are not the reference's, rounded: the cosine of model.layers.1.mlp.up_proj ("),
        (lose, [], "model.layers.1.mlp.up_proj cannot be unpacked: scales is missing"),
    ],
)
def test_refusals_write_nothing(
    change: Any, more: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(place, tmp_path / "packed", "gptq")
    if change is not None:
        change(tmp_path / "packed")
    had = sorted(tmp_path.rglob("*"))
    assert run(place, tmp_path / "packed", tmp_path / "new" / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == had


def test_another_reference_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(place, tmp_path / "packed", "gptq")
    other = copy.deepcopy(loaded(place / "llama"))
    other.resize_token_embeddings(104)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place / "llama" / name, tmp_path / "other" / name)
    had = sorted(tmp_path.rglob("*"))
    assert (
        run(tmp_path, tmp_path / "packed", tmp_path / "out", "--calibration", str(place / "text.txt"), model="other")
        == 2
    )
    message = "model.embed_tokens.weight is (96, 32) in the checkpoint, (104, 32) in the reference"
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == had


@pytest.mark.parametrize("arguments", [["--order", "random"], ["--statistic", "position"], ["--samples", "0"]])
def test_arguments_are_checked(
    arguments: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(place, tmp_path / "packed", tmp_path / "out", *arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_what_exists_is_not_written_over(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(place, tmp_path / "packed", "gptq")
    assert run(place, tmp_path / "packed", tmp_path / "packed") == 2
    assert "packed exists" in capsys.readouterr().err


def test_nothing_is_left_of_what_does_not_load(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(place, tmp_path / "packed", "gptq")

    def spoiled(folder: Path, source: Path, **options: Any) -> Any:
        path = folder / "model.safetensors"
        state = load_file(path)
        state["model.layers.1.mlp.down_proj.bias"] += 1
        save_file(state, path, metadata={"format": "pt"})
        return verify_corrected(folder, source, **options)

    verify_corrected = command.verify_corrected
    monkeypatch.setattr(command, "verify_corrected", spoiled)
    had = sorted(tmp_path.rglob("*"))
    assert run(place, tmp_path / "packed", tmp_path / "out") == 2
    assert "does not load as what was made, and nothing is kept:\nlogits differ by" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == had


def test_scales_that_a_tool_has_moved_are_followed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moved_scales(loaded(place / "llama"))
    model.save_pretrained(tmp_path / "moved")
    shutil.copyfile(place / "llama" / "generation_config.json", tmp_path / "moved" / "generation_config.json")
    values = write_packed(tmp_path / "moved", tmp_path / "packed", KINDS["awq"])
    assert run(place, tmp_path / "packed", tmp_path / "out", "--held-out", "0") == 0
    assert "compared with the scales of 6 norms and layers where the checkpoint has them" in capsys.readouterr().out
    corrected, reference = built(tmp_path / "out", values), loaded(place / "llama")
    assert divergence(corrected, reference) < 0.9 * divergence(built(tmp_path / "out", values, False), reference)


def test_rounding_of_the_tests_is_coarse() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    error = (rounded(weight).values - weight).square().mean() / weight.square().mean()
    assert 0.02 < float(error) < 0.5
