"""The first tokens of a text from a prefix of it, the same as if all of it had been tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

FIRST = 1 << 16  # characters of the first prefix, which tells how many a token has
ENDS = 8  # prefixes that are compared, each one character shorter than the one before
MARGIN = 512  # tokens at the end of what they have in common that are not kept
ALL = 1 << 62  # characters or tokens: more than any text has
GIVE_UP = 4  # times as many tokens as are needed, and still not enough that are settled: all of the text is tokenized


def tokens(text: str, tokenizer: Any) -> Tensor:
    """Returns a text's tokens, (n,). The text may be longer than the model's context, as it is cut into windows."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def first_tokens(pieces: Iterable[str], tokenizer: Any, count: int) -> Tensor:
    """Returns at least ``count`` tokens from the start of a text, or all if it has fewer.

    They are those of ``tokenizer(whole text)``, though only a prefix is read, if the tokenizer has these properties:

    1. It looks ahead a bounded way: a token depends on nothing beyond the ``MARGIN`` tokens that follow it. Tokenizers
       that first split a text into words (GPT-2's, LLaMA 3's, Qwen's, BERT's) look to the end of a word.
    2. Or it has no bound, but a text up to a token's end has the tokens that the longer text has up to there. This is
       so for BPE over a whole text (two tokens may be neighbours or not, whatever is around them), for Unigram (the
       best path to a position is the start of each best path through it) and for WordPiece (longest match first). The
       whole text has a token that ends within a token's length of the prefix's end, hence begins as the prefix that is
       cut there. ``ENDS`` prefixes are cut at neighbouring characters, and only what all of them begin with is kept.
       No longer token may cross the end; the margin makes up for those that are longer.

    Special tokens at the end of a prefix are not in what is kept; those at its start are. If the prefixes do not agree
    on enough tokens, longer ones are tried. In the end the whole text is tokenized, and then nothing is assumed.

    Args:
        pieces: the text, in order; read no further than is needed.
        tokenizer: of the model.
        count: tokens that are needed, at least 1.
    """
    rest = iter(pieces)
    text, wanted = "", FIRST
    while True:
        text = read_on(text, rest, wanted)
        if len(text) < wanted:
            return tokens(text, tokenizer)
        ids = tokens(text, tokenizer)
        if len(ids) < count + MARGIN:  # read as much as it should take, and some more, as texts vary
            wanted = max(len(text) * 5 // 4, len(text) * (count + MARGIN) * 21 // (20 * max(len(ids), 1)))
            continue
        settled = _settled(ids, text, tokenizer)
        if len(settled) >= count:
            return settled
        wanted = 2 * len(text) if len(ids) < GIVE_UP * (count + MARGIN) else ALL


def read_on(text: str, rest: Iterator[str], wanted: int) -> str:
    """Returns a text with what follows, of at least ``wanted`` characters, or fewer if there are no more."""
    parts, has = [text], len(text)
    while has < wanted:
        part = next(rest, None)
        if part is None:
            break
        parts.append(part)
        has += len(part)
    return "".join(parts)


def _settled(ids: Tensor, text: str, tokenizer: Any) -> Tensor:
    """Returns the tokens of a text that it keeps whatever follows it; see :func:`first_tokens`."""
    common = len(ids)
    for cut in range(1, ENDS):
        others = tokens(text[:-cut], tokenizer)
        common = min(common, len(others))
        differ = (ids[:common] != others[:common]).nonzero()
        common = int(differ[0]) if len(differ) else common
    return ids[: max(common - MARGIN, 0)]
