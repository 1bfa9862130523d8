"""Run by a Python of any version of transformers, without opt8bit: saves tokenizers, and loads checkpoints plainly.

python plain_transformers.py version
python plain_transformers.py tokenizer KIND FOLDER
python plain_transformers.py weights FOLDER...   # random ones, for their configurations
python plain_transformers.py load TEXT RESULTS FOLDER   # all checkpoints inside
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = "the weights of a language model are rounded to eight bits so that its outputs change least".split()
VOCABULARY = 320
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def of_llama() -> tuple[Any, list[str]]:
    """Returns a BPE tokenizer as LLaMA's and Mistral's checkpoints have it, untrained, and its special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer, ["<unk>", "<s>", "</s>", *BYTES]


def of_qwen2() -> tuple[Any, list[str]]:
    """Returns a BPE tokenizer over bytes as Qwen's checkpoints have it, untrained, and its special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = rf"{words}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, ["<|endoftext|>"]


def of_gemma() -> tuple[Any, list[str]]:
    """Returns a BPE tokenizer as Gemma's checkpoints have it, untrained, and its special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES]


TOKENIZERS: dict[str, tuple[Callable[[], tuple[Any, list[str]]], str]] = {
    "llama": (of_llama, "LlamaTokenizerFast"),
    "qwen2": (of_qwen2, "Qwen2TokenizerFast"),
    "gemma": (of_gemma, "GemmaTokenizerFast"),
}


def save_tokenizer(kind: str, folder: Path) -> None:
    """Trains a small tokenizer and saves it as transformers does."""
    import transformers
    from tokenizers import pre_tokenizers, trainers

    make, name = TOKENIZERS[kind]
    tokenizer, special = make()
    letters = pre_tokenizers.ByteLevel.alphabet() if kind == "qwen2" else []
    trainer: Any = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters)  # type: ignore[call-arg]
    tokenizer.train_from_iterator([" ".join(WORDS)] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    getattr(transformers, name)(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)


def save_weights(folder: Path) -> None:
    """Saves random weights of the model that a folder's configuration describes, and leaves the configuration."""
    import torch
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config)
    for param in model.parameters():
        torch.nn.init.normal_(param, 1.0 if param.dim() == 1 else 0.0, 0.2)
    written = (folder / "config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "config.json").write_bytes(written)


def load(text: str, folder: Path) -> dict[str, Any]:
    """Loads a model and its tokenizer as anybody does, and runs the one on what the other makes of a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        model, info = loaded
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids])).logits.float()
    except Exception as error:  # for the test to report
        return {"ids": [], "logits": torch.full((1,), torch.inf), "wrong": [f"{type(error).__name__}: {error}"]}
    wrong = sorted(str(key) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[name])
    return {"ids": ids, "logits": logits, "wrong": wrong}


def main(command: str, *arguments: str) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    if command == "version":
        print(transformers.__version__)
    elif command == "tokenizer":
        save_tokenizer(arguments[0], Path(arguments[1]))
    elif command == "weights":
        for folder in arguments:
            save_weights(Path(folder))
    else:
        import torch

        text, results, folder = arguments
        checkpoints = sorted(file.parent for file in Path(folder).glob("*/*/config.json"))
        torch.save({f"{path.parent.name}/{path.name}": load(text, path) for path in checkpoints}, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
