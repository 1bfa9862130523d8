"""Adds a tokenizer to a GGUF file, from ``tokenizer.json``: byte-level BPE, or what was made of SentencePiece."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt8bit.ptq.model.gguf.reading import package
from opt8bit.warning import quiet, warn

TOKENIZER = "tokenizer.json"
OTHERS = ("tokenizer.model", "vocab.json", "vocab.txt")
SPACE = "▁"  # of SentencePiece
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: Mapping[str, tuple[tuple[Any, ...], ...]] = {  # llama.cpp's name: the parts in tokenizer.json
    "gpt-2": (("ByteLevel", True),),
    "smollm": (("Digits", True), ("ByteLevel", True)),
    "llama-bpe": (("Split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)),
    "qwen2": (("Split", _CONTRACTIONS + r"\p{N}" + _REST), ("ByteLevel", False)),
}
KEEPS_WHOLE_WORDS = ("llama-bpe",)  # that llama.cpp looks up before it merges
NORMALIZERS = (None, "NFC")
# Whether a space is put before a text, by the parts of the normalizer and of the pre-tokenizer.
SPACES: Mapping[tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]], bool] = {
    (("Replace",), (("Split", " "),)): False,
    (("Replace",), ()): False,
    (("Prepend", "Replace"), ()): True,
    ((), (("Metaspace", "never"),)): False,
    ((), (("Metaspace", "always"),)): True,
    ((), (("Metaspace", "first"),)): True,
}


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Checks that a tokenizer can be written, where there is one in a folder.

    Args:
        folder: with the tokenizer's files, as transformers writes them.
        vocabulary: rows of the embedding, of which the last may have no token.

    Raises:
        ValueError: it is of another kind, splits texts in a way that is not known here, or has more tokens than the
            embedding has rows.
    """
    found = _read(folder)
    if found is not None:
        if space_prefix(found) is None:
            pre_tokenizer(found)
        _tokens(found, vocabulary)


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Adds the tokenizer in a folder to a GGUF file.

    Args:
        writer: of the file, gguf's ``GGUFWriter``.
        folder, vocabulary: as of :func:`check_tokenizer`.

    Raises:
        ValueError: as :func:`check_tokenizer`.

    Warns:
        UserWarning: there is none.
    """
    found = _read(folder)
    if found is None:
        warn("the GGUF file gets no tokenizer, without which llama.cpp's programs do not run it: give export one")
        writer.add_tokenizer_model("no_vocab")
        return
    tokens, types = _tokens(found, vocabulary)
    prefix = space_prefix(found)
    if prefix is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(found))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(found, tokens))
        writer.add_add_space_prefix(prefix)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with quiet("gguf.vocab"):  # of templates for pairs of texts
        special = package().SpecialVocab(folder, load_merges=prefix is None, n_vocab=vocabulary)
    for kind in ("bos", "eos"):
        special.add_special_token.setdefault(kind, False)  # or llama.cpp's own default holds
    special.add_to_gguf(writer, quiet=True)


def space_prefix(tokenizer: Mapping[str, Any]) -> bool | None:
    """Returns whether a tokenizer that was made of SentencePiece puts a space before a text; None for other kinds.

    Args:
        tokenizer: what ``tokenizer.json`` holds.
    """
    model, parts = tokenizer["model"], _parts(tokenizer.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    return SPACES.get((_normalizers(tokenizer.get("normalizer")), parts))


def _scores(tokenizer: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Returns the order in which SentencePiece merges: the first merge that makes a token has the highest score.

    Merges in ``tokenizer.json`` are all the ways to make each token, in the order of SentencePiece's own scores.
    """
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of how a tokenizer splits a text before it merges.

    Args:
        tokenizer: what ``tokenizer.json`` holds.

    Raises:
        ValueError: it is not byte-level BPE, or splits texts in a way that is not known here.
    """
    kind = tokenizer["model"].get("type")
    parts = _parts(tokenizer.get("pre_tokenizer"))
    if kind != "BPE" or not parts or parts[-1][0] != "ByteLevel":
        raise ValueError(f"gguf holds tokenizers of byte-level BPE and SentencePiece, got {kind} after {_words(parts)}")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"gguf holds tokenizers with the normalizers none and NFC, got {normalizer}")
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == parts), None)
    if name is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"gguf holds tokenizers that split texts as {known}, got {_words(parts)}")
    if tokenizer["model"].get("ignore_merges") and name not in KEEPS_WHOLE_WORDS:
        raise ValueError(f"llama.cpp has no ignore_merges for tokenizers that split texts as {name}")
    return name


def _read(folder: Path) -> dict[str, Any] | None:
    """Returns what ``tokenizer.json`` holds, or None where a folder has no tokenizer.

    Raises:
        ValueError: there is one in other files, or the file is damaged.
    """
    path = folder / TOKENIZER
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(found["model"], dict)
            return found
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    others = [name for name in OTHERS if (folder / name).is_file()]
    if others:
        raise ValueError(f"gguf holds the tokenizer of {TOKENIZER}, and {folder} has only {', '.join(others)}")
    return None


def _parts(given: Any) -> tuple[tuple[Any, ...], ...]:
    """Returns the parts of a pre-tokenizer, as :data:`PRE_TOKENIZERS` has them."""
    if given is None:
        return ()
    found: list[tuple[Any, ...]] = []
    for part in given["pretokenizers"] if given["type"] == "Sequence" else [given]:
        kind = part["type"]
        if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            found.append((kind, part["pattern"].get("Regex")))
        elif kind == "Split" and part["pattern"].get("String") == " " and part.get("behavior") == "MergedWithPrevious":
            found.append((kind, " "))
        elif kind == "Metaspace" and not part.get("split", True):
            found.append((kind, part.get("prepend_scheme")))
        elif kind == "Digits":
            found.append((kind, part.get("individual_digits")))
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            found.append((kind, part.get("use_regex", True)))
        else:
            found.append((json.dumps(part),))
    return tuple(found)


def _normalizers(given: Any) -> tuple[str, ...]:
    """Returns the parts of a normalizer, as :data:`SPACES` has them."""
    if given is None:
        return ()
    parts = given["normalizers"] if given["type"] == "Sequence" else [given]
    known = {"Replace": {"pattern": {"String": " "}, "content": SPACE}, "Prepend": {"prepend": SPACE}}
    kinds = [part["type"] for part in parts]
    return tuple(
        kind if known.get(kind) == {name: value for name, value in part.items() if name != "type"} else json.dumps(part)
        for kind, part in zip(kinds, parts, strict=True)
    )


def _words(parts: tuple[tuple[Any, ...], ...]) -> str:
    return " and ".join(" ".join(map(str, part)) for part in parts) or "no pre-tokenizer"


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Returns the tokens by number, and their types.

    Raises:
        ValueError: there are more than the embedding has rows.
    """
    kinds, model = package().TokenType, tokenizer["model"]
    has_bytes = model.get("byte_fallback")
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [int(kinds.UNUSED)] * vocabulary
    found = [
        (token, i, kinds.BYTE if has_bytes and BYTE.fullmatch(token) else kinds.NORMAL)
        for token, i in model["vocab"].items()
    ]
    found += [
        (added["content"], added["id"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
        for added in tokenizer.get("added_tokens", [])
    ]
    for token, i, kind in found:
        if i >= vocabulary:
            raise ValueError(f"token {i}, {token!r}, has no row in the embedding, which has {vocabulary}")
        is_unknown = has_bytes and token == model.get("unk_token")
        tokens[i] = token.replace(SPACE, " ") if kind == kinds.USER_DEFINED else token  # is looked for in plain text
        types[i] = int(kinds.UNKNOWN if is_unknown else kind)
    return tokens, types
