"""The first tokens of a text from a prefix are those of the whole text, whatever the tokenizer looks ahead for."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from opt8bit.cli.texts import prefix
from opt8bit.cli.texts.prefix import first_tokens, tokens

FIRST, MARGIN, ENDS = 512, 64, 8


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of some thousand characters are long."""
    monkeypatch.setattr(prefix, "FIRST", FIRST)
    monkeypatch.setattr(prefix, "MARGIN", MARGIN)


def wrapped(tokenizer: Any, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def bpe(alphabet: str, merges: list[tuple[str, str]]) -> Any:
    """A BPE over whole texts, of some merges in their order."""
    words = dict.fromkeys([*alphabet, *(left + right for left, right in merges)])
    return wrapped(Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges)))


def unigram(pieces: dict[str, float]) -> Any:
    return wrapped(Tokenizer(models.Unigram([("?", -99.0), *pieces.items()], unk_id=0, byte_fallback=False)))


def trained(texts: list[str], pre_tokenizer: Any, size: int) -> Any:
    """A BPE that was trained, with one special token before and one after a text."""
    tokenizer: Any = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(word, tokenizer.token_to_id(word)) for word in special]
    )
    return wrapped(tokenizer)


def bert() -> Any:
    tokenizer: Any = Tokenizer(
        models.WordPiece(
            {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "un": 3, "##aff": 4, "##able": 5, "##affab": 6, "a": 7, "##n": 8},
            unk_token="[UNK]",
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return wrapped(tokenizer)


def words(count: int, between: str) -> str:
    draw = random.Random(0)
    known = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 12))) for _ in range(60)]
    return "".join(draw.choice(known) + draw.choice(between or [""]) for _ in range(count))


CHAIN = [chr(0x4E00 + i) for i in range(3001)]  # each merges with the next, the last pair first
FALLING = list(pairwise(CHAIN))[::-1]
ALTERNATING = {"a": -3.0, "b": -5.0, "ab": -2.0, "ba": -1.9999}  # the parity of the end decides on all that is before
TEXT, DENSE = words(4000, "     \n\n,."), words(2000, "")
CASES = {
    "words": (lambda: trained([TEXT], pre_tokenizers.ByteLevel(), 400), TEXT),
    "metaspace": (lambda: trained([TEXT], pre_tokenizers.Metaspace(split=False), 400), TEXT),
    "no whitespace": (lambda: trained([DENSE], None, 600), DENSE),
    "words, no whitespace": (lambda: trained([TEXT], pre_tokenizers.ByteLevel(), 400), DENSE),
    "blanks": (lambda: trained([TEXT + " " * 999], None, 400), TEXT[:300] + " " * 9000 + TEXT),
    "long merges": (lambda: trained(["abcdefghij" * 999], None, 200), "abcdefghij" * 1500 + "abc"),
    "chain": (lambda: bpe("".join(CHAIN), FALLING), "".join(CHAIN) * 3),
    "Viterbi, odd": (lambda: unigram(ALTERNATING), "ab" * 4000 + "a"),
    "Viterbi, even": (lambda: unigram(ALTERNATING), "ab" * 4000),
    "Viterbi, words": (lambda: unigram({c: -9.0 for c in TEXT} | {w: -len(w) / 3 for w in TEXT.split()}), TEXT),
    "WordPiece": (bert, "unaffable unaffabl un aaffaban\n" * 500),
    "WordPiece, unknown": (bert, "un " * 300 + "unaffable" * 3000),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 100, 700, 1 << 20])
def test_a_prefix_has_the_tokens_of_the_whole_text(case: str, count: int) -> None:
    make, text = CASES[case]
    tokenizer = make()
    whole = tokens(text, tokenizer)
    found = first_tokens(pieces(text), tokenizer, count)
    assert len(found) >= min(count, len(whole))
    assert torch.equal(found, whole[: len(found)])


def pieces(text: str) -> Iterator[str]:
    yield from (text[i : i + 100] for i in range(0, len(text), 100))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_without_a_margin_tokens_may_be_as_long_as_the_ends(data: Any) -> None:
    """Three letters and random merges or scores make every kind of far-reaching dependence."""
    alphabet = "abc"
    text = data.draw(st.text(alphabet, min_size=40, max_size=300) | st.text(alphabet, max_size=7).map(lambda t: t * 40))
    longer = st.text(alphabet, min_size=2, max_size=ENDS)
    if data.draw(st.booleans()):
        scores = st.floats(-9, -1) | st.sampled_from([-2.0, -1.0])
        known = data.draw(st.dictionaries(longer, scores, max_size=9))
        tokenizer = unigram({"a": -2.0, "b": -2.5, "c": -3.0} | known)
    else:
        merges, known_words = [], list(alphabet)
        for _ in range(data.draw(st.integers(0, 9))):
            left, right = data.draw(st.tuples(st.sampled_from(known_words), st.sampled_from(known_words)))
            if len(left + right) <= ENDS and (left, right) not in merges:
                merges.append((left, right))
                known_words.append(left + right)
        tokenizer = bpe(alphabet, merges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "FIRST", 16)
        patch.setattr(prefix, "MARGIN", 0)
        found = first_tokens(iter(text), tokenizer, 12)
    whole = tokens(text, tokenizer)
    assert torch.equal(found, whole[: len(found)]) and len(found) >= min(12, len(whole))


@pytest.mark.parametrize("case", ["words", "no whitespace", "metaspace", "Viterbi, words"])
def test_no_more_is_read_than_is_needed(case: str) -> None:
    make, text = CASES[case]
    tokenizer, read = make(), 0

    def counted() -> Iterator[str]:
        nonlocal read
        for piece in pieces(text):
            read += len(piece)
            yield piece

    found = first_tokens(counted(), tokenizer, 300)
    assert len(found) >= 300
    assert read < 3 * len(text) * (300 + MARGIN) / len(tokens(text, tokenizer)) + 200 < len(text)


def test_special_tokens_at_the_end_are_those_of_the_text() -> None:
    tokenizer = CASES["words"][0]()
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    found = first_tokens(pieces(TEXT), tokenizer, 300)
    assert found[0] == start and end not in found
    assert first_tokens(pieces(TEXT), tokenizer, 1 << 20)[-1] == end
