"""Files for llama.cpp: what is stored, and what llama.cpp computes with it where it is installed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import GATED, _make

from opt8bit import ptq
from opt8bit.ptq.inspect import inspect, unpacked_weight
from opt8bit.ptq.model.gguf.architectures import as_halves, as_neighbours
from opt8bit.ptq.model.gguf.blocks import pack_blocks, unpack_blocks
from opt8bit.quant.weight import QuantizedWeight

gguf: Any = pytest.importorskip("gguf")

VOCABULARY = 320
SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
WIDE: dict[str, Any] = {**GATED, "vocab_size": VOCABULARY, "hidden_size": 64, "initializer_range": 0.2}
GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_scaling": LLAMA3}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma3": ("Gemma3", GEMMA),
}
LAYER = "model.layers.1.self_attn.q_proj"
# The regular expressions of Qwen2's and LLaMA 3's tokenizer.json.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_BPE = QWEN2.replace(r"\p{N}| ", r"\p{N}{1,3}| ")


def make(name: str = "llama", **options: Any) -> Any:
    kind, own = ARCHITECTURES[name]
    if kind != "Gemma3":
        return _make(kind, **{**WIDE, **own, **options})()
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**{**WIDE, **own, **options})
    return transformers.Gemma3ForCausalLM(config).eval()


def ids(samples: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def compressed(model: Any, **options: Any) -> ptq.Result:
    return ptq.compress(model, ids(), **{"bits": 4, "runtime": "llama.cpp", "method": "rtn", **options})


def tokenizer(pattern: str | None = None, digits: bool = False) -> Any:
    """Byte-level BPE with a few words, of texts that are split before as GPT-2 does, or by a pattern."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    parts += [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    made.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level]) if parts else byte_level
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat. It's 12345 \n\n" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def export(made: ptq.Result, folder: Path, tokenizer_of: Any = None) -> Path:
    return ptq.export(made, folder / "out", tokenizer=tokenizer_of or tokenizer())


def sentencepiece(prefix: bool) -> Any:
    """BPE as transformers makes it of SentencePiece: spaces are letters, other letters are bytes, and all ways to make
    a token are merges, in the order of the tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,'"]
    words = ["th", "▁th", "▁the", "at", "▁c", "▁cat", "in", "ing", "▁s", "▁sat", "▁▁", "▁on", "the", "he", "▁m", "▁mat"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    vocab = {token: i for i, token in enumerate(tokens)}
    splits = [(word[:i], word[i:]) for word in words for i in range(1, len(word))]
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    made: Any = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replaced: list[Any] = [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *replaced] if prefix else replaced)
    if not prefix:
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def stored(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def fields(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / "model.gguf").fields.items()}


@pytest.mark.parametrize("bits", SYMMETRIC)
def test_ggufs_decoder_reads_the_blocks(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (6, 96), dtype=torch.uint8, generator=generator)
    scale = torch.randn(6, 3, generator=generator).half()
    codes[0], codes[1], scale[2], scale[3] = 0, 2**bits - 1, 6e-8, -65504
    blocks = pack_blocks(SYMMETRIC[bits], codes, [scale])
    found = gguf.quants.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType[SYMMETRIC[bits]])
    expected = (codes.unflatten(1, (3, 32)).double() - 2 ** (bits - 1)) * scale.double()[..., None]
    assert np.array_equal(found, expected.flatten(1).numpy())
    read, (read_scale,) = unpack_blocks(SYMMETRIC[bits], blocks)
    assert torch.equal(read, codes) and torch.equal(read_scale, scale)


def test_the_bytes_are_those_of_ggufs_own_rounding() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q5_0))
    blocks = expected.unflatten(1, (2, 22))
    assert torch.equal(pack_blocks("Q5_0", *unpack_blocks("Q5_0", blocks)), blocks)


def test_rows_of_heads_are_in_llama_cpps_order() -> None:
    weight = torch.randn(64, 8)
    expected = weight.numpy().reshape(4, 2, 8, 8).swapaxes(1, 2).reshape(64, 8)  # as its converter has it
    assert np.array_equal(as_neighbours(weight, 4).numpy(), expected)
    assert torch.equal(as_halves(as_neighbours(weight, 4), 4), weight)


@pytest.mark.parametrize("bits", SYMMETRIC)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_written_is_read_back(name: str, bits: int, tmp_path: Path) -> None:
    if bits != 4 and name != "llama, biases":
        pytest.skip("widths are tested with one model")
    made = compressed(make(name), bits=bits, bias_correction="sequential")
    folder = export(made, tmp_path)
    verification = ptq.verify(folder)
    assert verification.is_right and verification.error < (1e-5 if name == "gemma3" else 1e-12)
    contents = inspect(folder)
    layers = {name: layer.bits for name, layer in contents.layers.items() if ".layers." in name}
    assert len(layers) == 14 and set(layers.values()) == {bits}
    assert contents.layers["model.embed_tokens"].bits == 8
    change = made.changes[f"{LAYER}.weight"]
    assert isinstance(change, QuantizedWeight)
    found = unpacked_weight(folder, LAYER)
    values = (found.codes - found.zero_point[:, found.group]) * found.scale.float()[:, found.group]
    assert torch.equal(values, change.dequantize())


def test_each_kind_of_tensor_has_its_type(tmp_path: Path) -> None:
    model = make(hidden_size=64, intermediate_size=48)  # which 32 does not divide
    overrides = {"*.down_proj": None, "*.v_proj": {"bits": 8}}
    folder = export(compressed(model, overrides=overrides, bias_correction="local"), tmp_path)
    kinds = {name: tensor.tensor_type.name for name, tensor in stored(folder).items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == kinds["blk.1.attn_v.weight"] == "Q8_0"
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert ptq.verify(folder).is_right


def test_a_changed_code_is_noticed(tmp_path: Path) -> None:
    folder = export(compressed(make()), tmp_path)
    data = gguf.GGUFReader(folder / "model.gguf", "r+")
    tensor = next(tensor for tensor in data.tensors if tensor.name == "blk.1.ffn_down.weight")
    tensor.data[:, 2:18] ^= 0x77
    data.data.flush()
    assert not ptq.verify(folder).is_right


def test_the_configuration_is_told(tmp_path: Path) -> None:
    model = make("llama3", rms_norm_eps=1e-5)
    folder = export(compressed(model), tmp_path)
    found = fields(folder)
    assert found["general.architecture"] == "llama" and found["llama.block_count"] == 2
    assert found["llama.attention.head_count"] == 4 and found["llama.attention.head_count_kv"] == 2
    assert found["llama.rope.dimension_count"] == 16 and found["llama.rope.freq_base"] == 10000.0
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert found["llama.context_length"] == 128 and found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    plain = 10000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    expected = plain / model.model.rotary_emb.inv_freq.double()  # as transformers has it
    factors = stored(folder)["rope_freqs.weight"].data
    assert np.allclose(factors, expected.numpy(), rtol=1e-5) and factors.max() == 8


def test_rotary_embeddings_are_read_in_the_words_of_transformers_4_too() -> None:
    from opt8bit.ptq.export.gguf.metadata import rope_of

    scaling = {"rope_type": "linear", "factor": 8.0}
    older = SimpleNamespace(rope_theta=1e6, rope_scaling=scaling, rope_local_base_freq=1e4)
    newer = SimpleNamespace(
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, **scaling},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }
    )
    for config in (older, newer):
        assert rope_of(config) == (1e6, "linear", {"factor": 8.0})
        assert rope_of(config, "sliding_attention") == (1e4, "default", {})


def test_the_tokenizer_is_told(tmp_path: Path) -> None:
    ours = tokenizer()
    ours.chat_template = "{{ messages }}"
    folder = export(compressed(make()), tmp_path, ours)
    found = fields(folder)
    assert found["tokenizer.ggml.tokens"][: len(ours)] == ours.convert_ids_to_tokens(range(len(ours)))
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCABULARY - 1}]"
    types = found["tokenizer.ggml.token_type"]
    assert (types[0], types[5], types[-1]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
    assert found["tokenizer.ggml.merges"][0] == "a t" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.chat_template"] == "{{ messages }}"


def test_sentencepiece_is_told_by_its_merges(tmp_path: Path) -> None:
    folder = export(compressed(make()), tmp_path, sentencepiece(prefix=True))
    found = fields(folder)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    assert scores["th"] == 0 > scores["▁th"] > scores["▁the"] > scores["▁mat"] > scores["a"] == scores["</s>"]
    kinds = gguf.TokenType
    assert types[:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE] and types[-1] == kinds.UNUSED
    assert found["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "sentencepiece", "sentencepiece, prefix"])
def test_llama_cpp_splits_texts_alike(kind: str, tmp_path: Path) -> None:
    xllamacpp: Any = pytest.importorskip("xllamacpp")
    if kind.startswith("sentencepiece"):
        ours = sentencepiece(kind.endswith("prefix"))
    else:
        ours = tokenizer({"llama-bpe": LLAMA_BPE, "qwen2": QWEN2}.get(kind), digits=kind == "smollm")
    params = xllamacpp.CommonParams()
    params.model.path = str(export(compressed(make()), tmp_path, ours) / "model.gguf")
    params.n_ctx, params.warmup = 128, False
    server = xllamacpp.Server(params)
    letter = ours.convert_tokens_to_ids("a")

    def behind(prompt: Any) -> Any:
        asked = {"n_predict": 1, "n_probs": 9, "cache_prompt": False, "logit_bias": [[letter, 1e3]]}
        answer = server.handle_completions({"prompt": prompt, **asked})
        (chosen,) = answer["choices"][0]["logprobs"]["content"]
        return answer["usage"]["prompt_tokens"], [each["logprob"] for each in chosen["top_logprobs"]]

    for text in [
        "the cat sat on the mat.",
        "  the  cat",
        "naïve café, 日本語 🙂\n\nit's",
        "THE CAT'S 123456 cats!",
        "12",
    ]:
        assert behind(text) == behind(ours(text)["input_ids"]), text


def with_parts(parts: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}, **others}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (with_parts([split(QWEN2), BYTES], normalizer={"type": "NFC"}), "qwen2"),
        (with_parts([split(LLAMA_BPE), BYTES]), "llama-bpe"),
        (with_parts([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}]), "smollm"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": {**BYTES, "use_regex": True}}, "gpt-2"),
        (
            with_parts([split(r"\d+"), BYTES]),
            r"that split texts as gpt-2, smollm, llama-bpe, qwen2, got Split \\d\+ and",
        ),
        (with_parts([split(QWEN2), BYTES], normalizer={"type": "NFKC"}), "normalizers none and NFC, got NFKC"),
        ({"model": {"type": "WordLevel"}, "pre_tokenizer": BYTES}, "BPE and SentencePiece, got WordLevel after ByteL"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "BPE and SentencePiece, got BPE after no pre-tokenizer"),
        (
            {"model": {"type": "BPE", "ignore_merges": True}, "pre_tokenizer": {**BYTES, "use_regex": True}},
            "llama.cpp has no ignore_merges for tokenizers that split texts as gpt-2",
        ),
    ],
    ids=str,
)
def test_how_a_text_is_split_is_told_by_name(found: dict[str, Any], expected: str, tmp_path: Path) -> None:
    from opt8bit.ptq.export.gguf.tokenizer import PRE_TOKENIZERS, check_tokenizer, pre_tokenizer

    if expected in PRE_TOKENIZERS:
        assert pre_tokenizer(found) == expected
        return
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=expected):
        check_tokenizer(tmp_path, VOCABULARY)


@pytest.mark.parametrize(
    ("name", "model", "options", "message"),
    [
        ("llama", {}, {"bits": 3}, r"layers.0.*: gguf holds symmetric grids of 4, 5, 8 bits, got 3 bits, symmetric"),
        ("llama", {}, {"symmetric": False}, r"gguf holds symmetric grids of 4, 5, 8 bits, got 4 bits, asymmetric"),
        ("llama", {}, {"group_size": 16}, r"gguf has groups of 32 weights, got 16"),
        ("llama", {"hidden_act": "gelu"}, {}, "llama.cpp's llama has the activation 'silu', got 'gelu'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {},
            "llama has the rope_type default, linear, llama3",
        ),
        ("qwen2", {"rope_scaling": LLAMA3}, {}, "llama.cpp's qwen2 has the rope_type default, linear, got 'llama3'"),
        ("qwen3", {"attention_bias": True}, {}, r"o_proj.bias: llama.cpp's qwen3 has no place for it"),
        ("gemma3", {"final_logit_softcapping": 30.0}, {}, "gemma3 has final_logit_softcapping=None, got 30.0"),
        ("gemma3", {"query_pre_attn_scalar": 64}, {}, "llama.cpp's gemma3 has query_pre_attn_scalar=16, got 64"),
    ],
    ids=str,
)
def test_what_llama_cpp_does_not_compute_is_refused_before_the_work(
    name: str, model: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    def see(*of_a_layer: Any) -> None:
        pytest.fail("the work has begun")

    with pytest.raises(ValueError, match=message):
        compressed(make(name, **model), see=see, **options)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gguf holds models of the types llama, mistral, qwen2.*, got 'falcon'"):
        ptq.compress(_make("Falcon", **GATED)(), ids() % 96, bits=4, checkpoint_format="gguf")


def test_no_biases_are_made_that_llama_cpp_refuses(tmp_path: Path) -> None:
    made = compressed(make("qwen3"), bias_correction="sequential")
    notes = {row.note for row in made.report if row.name.endswith("q_proj")}
    assert notes == {"llama.cpp, as in xllamacpp 2026.10 does not load all biases that come with this one"}
    folder = export(made, tmp_path)
    assert not any(name.endswith(".bias") for name in stored(folder))
    assert json.loads((folder / "config.json").read_text())["attention_bias"] is False


def test_numbers_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    model = make()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e5
    made = compressed(model, overrides={"*.down_proj": None})
    with pytest.raises(ValueError, match=r"0\.mlp\.down_proj.weight has values that float16 does not hold"):
        export(made, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_that_the_model_does_not_load_are_left(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    made = compressed(ptq.Checkpoint(tmp_path / "model"))
    folder = export(made, tmp_path)
    assert ptq.verify(folder).is_right and not any("inv_freq" in name for name in stored(folder))


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    make(vocab_size=264).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"token \d+, '.+', has no row in the embedding, which has 264"):
        ptq.compress(ptq.Checkpoint(tmp_path / "model"), ids() % 264, bits=4, runtime="llama.cpp")


def test_a_checkpoint_with_other_names_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight: .* the model's own names, got embed_tokens.weight"
    ):
        compressed(ptq.Checkpoint(tmp_path / "model"))


def test_biases_are_not_added_to_a_file(tmp_path: Path) -> None:
    from opt8bit.ptq.corrected_checkpoint.correction import correct_checkpoint

    model = make()
    source = ptq.Checkpoint(export(compressed(model), tmp_path), unpack=True)
    with pytest.raises(ValueError, match=r"biases are added to .safetensors files, got .*model.gguf"):
        correct_checkpoint(source, model, ids(), tmp_path / "corrected")


def test_a_damaged_file_is_told_by_its_name(tmp_path: Path) -> None:
    folder = export(compressed(make()), tmp_path)
    data = (folder / "model.gguf").read_bytes()
    for kept in (0, 20, len(data) // 2):
        (folder / "model.gguf").write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"out/model\.gguf is missing or damaged"):
            inspect(folder)


def test_a_file_without_a_tokenizer_is_warned_of(tmp_path: Path) -> None:
    made = compressed(make())
    with pytest.warns(UserWarning, match="no tokenizer, without which llama.cpp's programs do not run it"):
        folder = ptq.export(made, tmp_path / "out")
    assert fields(folder)["tokenizer.ggml.model"] == "no_vocab" and ptq.verify(folder).run_error is None


def test_windows_of_attention_shorten_the_context(tmp_path: Path) -> None:
    folder = export(compressed(make("mistral", sliding_window=40)), tmp_path)
    assert fields(folder)["llama.context_length"] == 40


def test_quality_is_that_of_the_rounded_embeddings() -> None:
    model = make()
    made = ptq.compress(model, ids(), bits=8, runtime="llama.cpp", method="rtn", held_out=ids(2))
    assert made.quality is not None
    with torch.no_grad():
        logits, logits_hat = (of(ids(2)).logits[:, :-1].double() for of in (model, made.compressed_model()))
    exact, ours = logits.log_softmax(-1), logits_hat.log_softmax(-1)
    divergence = float((exact.exp() * (exact - ours)).sum(-1).mean())
    assert made.quality.kl_divergence == pytest.approx(divergence, rel=1e-3)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= made.changes.keys()


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from opt8bit.cli.main import main

    make().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    arguments = ["compress", str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt")]
    arguments += ["--output", str(tmp_path / "out"), "--samples", "4", "--sequence-length", "16", "--method", "rtn"]
    assert main([*arguments, "--format", "gguf", "--bits", "5", "--bias-correction", "sequential"]) == 0
    assert "unpacked by opt8bit: transformers does not load the format gguf" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == main(["verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("5-bit Q5_0") == 14
    page = (tmp_path / "out" / "opt8bit" / "report.html").read_text()
    assert "llama-cli --model" in page and f"{tmp_path / 'out'}/model.gguf" in page
    evaluate = ["evaluate", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--samples", "2"]
    assert main([*evaluate, "--sequence-length", "16"]) == 0
    assert "perplexity " in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.gguf", "config.json", "tokenizer.json"} <= names and "model.safetensors" not in names


def as_float32(folder: Path, output: Path) -> Path:
    """Writes a file anew with the weights that gguf's decoder makes of it, of which llama.cpp rounds nothing."""
    found = gguf.GGUFReader(folder / "model.gguf")
    output.mkdir()
    writer = gguf.GGUFWriter(output / "model.gguf", found.fields["general.architecture"].contents())
    for name, field in found.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in found.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output / "model.gguf"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from opt8bit.ptq.export.gguf.running import log_probabilities

    model = make(name)
    for param_name, param in model.named_parameters():
        if param_name.endswith(".bias"):
            param.data += torch.randn_like(param)
    made = compressed(model, bias_correction="sequential")
    folder = export(made, tmp_path)
    text = ids(1)[0]
    with torch.no_grad():
        expected = made.compressed_model()(text[None]).logits[0, -1].log_softmax(-1)
    decoded = log_probabilities(as_float32(folder, tmp_path / "float32"), text.tolist())
    # It keeps keys and values in float16: an error of a thousandth of what they are.
    assert float((decoded - expected).abs().max()) < 2e-2 * float(expected.std())
    verification = ptq.verify(folder)
    assert verification.is_right and verification.run_error is not None


def test_what_llama_cpp_computes_otherwise_is_noticed(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = export(compressed(make()), tmp_path)
    data = gguf.GGUFReader(folder / "model.gguf", "r+")
    data.fields["llama.rope.freq_base"].parts[-1][:] = 10.0  # of which our own decoder knows nothing
    data.data.flush()
    verification = ptq.verify(folder)
    assert verification.error <= verification.tolerance and not verification.is_right
    assert "run by the program that reads the format" in str(verification)
