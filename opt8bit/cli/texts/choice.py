"""Chooses the windows of a text to calibrate on: the first ones, or random ones with a seed."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opt8bit.cli.errors import CommandError
from opt8bit.cli.texts.places import Text
from opt8bit.cli.texts.prefix import ALL, FIRST, first_tokens, read_on, tokens
from opt8bit.ptq.evaluate import windows

SMALL = 1 << 21  # characters: a text up to this is tokenized as a whole, and its windows are drawn
REMOTE = 1 << 28  # characters of a data set that is downloaded, from which windows are drawn
EDGE = 16  # tokens at the ends of a block that are not used: special ones, and those that cutting the text changes
SPARE = 2  # times as long as windows are expected to be are blocks


def choose_windows(
    text: Text, tokenizer: Any, *, length: int, samples: int, held_out: int, seed: int, bos: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Chooses windows to calibrate on, and others that tell how good the result is.

    Seed 0 takes the first windows of the text, one after another. With any other seed they are drawn: of the windows
    that lie one after another in a text of at most ``SMALL`` characters. A longer text is cut into blocks of about
    twice a window's length, of which some are drawn while it is read once; each gives one window from its start. No
    two windows overlap.

    Args:
        text: where it is.
        tokenizer: of the model.
        length: tokens of a window, at least 2.
        samples: windows to calibrate on, at least 1.
        held_out: other windows; fewer, if the text has no more.
        seed: of the draw, in the range of torch's.
        bos: whether the token that begins a text takes the place of each window's first.

    Returns:
        Token ids, (samples, length) and (held_out, length); None in place of no held-out windows.

    Raises:
        CommandError: the text cannot be read, or is too short; or the tokenizer has no token that begins a text.
    """
    count = samples + held_out
    if seed:
        found = _drawn(text, tokenizer, length, samples, count, seed)
    else:
        found = _cut(text, first_tokens(text.pieces(tokenizer), tokenizer, count * length), length, samples)
    found = _begun(found, tokenizer) if bos else found
    rest = found[samples:count]
    return found[:samples], rest if len(rest) else None


def first_windows(text: Text, tokenizer: Any, length: int, samples: int, *, bos: bool = False) -> Tensor:
    """Returns the first windows of a text, one after another, (samples, length).

    Args:
        bos: whether the token that begins a text takes the place of each window's first.

    Raises:
        CommandError: the text cannot be read, or the tokenizer has no token that begins a text.
        ValueError: it is too short.
    """
    found = windows(first_tokens(text.pieces(tokenizer), tokenizer, samples * length), length, samples)
    return _begun(found, tokenizer) if bos else found


def lacks_bos(tokenizer: Any) -> str | None:
    """Returns a sentence on windows without the token that a tokenizer puts before a text, or None if it puts none."""
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None or tokens("", tokenizer)[:1].tolist() != [first]:
        return None
    return f"the model expects {tokenizer.bos_token} before a text: with --bos, each window begins with it"


def _begun(ids: Tensor, tokenizer: Any) -> Tensor:
    """Returns windows whose first token is the one that begins a text.

    Raises:
        CommandError: the tokenizer has none.
    """
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None:
        raise CommandError("bos must be left out: the tokenizer has no token that begins a text")
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, 1:]], 1)


def _cut(text: Text, ids: Tensor, length: int, samples: int) -> Tensor:
    """Returns all windows of the tokens of a text, of which there must be ``samples``."""
    if len(ids) < samples * length:
        raise CommandError(
            f"{text.name}: {samples} samples of {length} tokens take {samples * length:,}, it has {len(ids):,}"
        )
    try:
        return windows(ids, length, len(ids) // length)
    except ValueError as error:
        raise CommandError(f"{text.name}: {error}") from error


def _drawn(text: Text, tokenizer: Any, length: int, samples: int, count: int, seed: int) -> Tensor:
    """Returns windows in random order, at least ``count`` if the text has so many."""
    pieces = text.pieces(tokenizer)
    start = read_on("", pieces, SMALL + 1)
    if len(start) > SMALL and text.can_be_read_again:
        found = _windows_of_blocks(text, tokenizer, start[:FIRST], length, count, seed)
        if found is not None:
            return found
    found = _cut(text, tokens(read_on(start, pieces, ALL), tokenizer), length, samples)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


def _windows_of_blocks(text: Text, tokenizer: Any, start: str, length: int, count: int, seed: int) -> Tensor | None:
    """Returns windows of blocks that are drawn, (count, length), or None if the text is too short for that."""
    characters_a_token = len(start) / max(len(tokens(start, tokenizer)), 1)
    size = int(SPARE * characters_a_token * (length + 2 * EDGE)) + 1
    drawn = count + count // 4 + 8  # some may have too few tokens
    while True:
        blocks, number = _draw(_blocks(text, tokenizer, size), drawn, seed)
        found = []
        for block in blocks:
            ids = tokens(block, tokenizer)
            if len(ids) >= length + 2 * EDGE and len(found) < count:
                found.append(ids[EDGE : EDGE + length])
        if len(found) == count:
            return torch.stack(found)
        if number <= 2 * drawn:
            return None
        size *= 2


def _blocks(text: Text, tokenizer: Any, size: int) -> Iterator[str]:
    """Yields the blocks of ``size`` characters of a text, without the rest at its end."""
    pieces = text.pieces(tokenizer)
    limit = REMOTE if text.is_remote else None
    begun, read = "", 0
    while limit is None or read < limit:
        begun = read_on(begun, pieces, size)
        if len(begun) < size:
            return
        whole = len(begun) - len(begun) % size
        for at in range(0, whole, size):
            yield begun[at : at + size]
        begun = begun[whole:]
        read += whole


def _draw(blocks: Iterator[str], count: int, seed: int) -> tuple[list[str], int]:
    """Draws ``count`` blocks, in random order, and returns them and how many there were.

    Each has a random number; the smallest are kept. So the text is read once, and no more of it held than is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[float, int, str]] = []
    number = 0
    for block in blocks:
        key = float(torch.rand((), generator=generator, dtype=torch.float64))
        entry = (-key, number, block)
        if len(kept) < count:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
        number += 1
    return [block for _, _, block in sorted(kept, reverse=True)], number
