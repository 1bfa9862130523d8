"""Codes of a few bits in 32-bit words: how packed checkpoints hold them.

Codes stand bit to bit, or each word holds whole codes only and what is left of it is 0. Both are the same for 1, 2, 4
and 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack(codes: Tensor, bits: int, *, whole_codes: bool = False) -> Tensor:
    """Packs the codes of each row into words.

    Code i of a row has bits ``i * bits`` and up of its row's little-endian stream; what is left of the last word is 0.
    With ``whole_codes`` word j has codes ``j * (32 // bits)`` and up, each word as a row of its own.

    Args:
        codes: (rows, n), integers below ``2^bits``.
        bits: of a code, 1 to 8.
        whole_codes: whether no code stands in two words.

    Returns:
        int32 (rows, :func:`words_of` (n, bits)).

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``codes`` are not (rows, n) and below ``2^bits``.
    """
    _check_bits(bits)
    if codes.dim() != 2 or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits):
        raise ValueError(f"codes must be (rows, n) and from 0 to {2**bits - 1}, got shape {tuple(codes.shape)}")
    if not whole_codes:
        return _stream(codes, bits)
    each = WORD // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    return _stream(padded.reshape(-1, each), bits).view(len(codes), -1)


def _stream(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % WORD))
    runs = padded.view(rows, -1, WORD)  # 32 codes fill `bits` words
    words = torch.zeros(*runs.shape[:2], bits, dtype=torch.int64, device=codes.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        shifted = runs[..., i].to(torch.int64) << shift
        words[..., word] |= shifted & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= shifted >> WORD
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.view(rows, -1)[:, : words_of(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int, *, whole_codes: bool = False) -> Tensor:
    """Returns the first ``count`` codes of every row, uint8 (rows, count), of what :func:`pack` made.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``words`` are not int32 (rows, :func:`words_of` (count, bits)).
    """
    _check_bits(bits)
    expected = words_of(count, bits, whole_codes=whole_codes)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != expected:
        raise ValueError(f"words must be int32 (rows, {expected}), got {words.dtype} of shape {tuple(words.shape)}")
    if whole_codes:
        return unpack(words.reshape(-1, 1), bits, WORD // bits).reshape(len(words), -1)[:, :count]
    unsigned = torch.nn.functional.pad(words, (0, -expected % bits)).to(torch.int64) & 0xFFFFFFFF
    runs = unsigned.view(len(words), -1, bits)
    codes = torch.empty(*runs.shape[:2], WORD, dtype=torch.uint8, device=words.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = runs[..., word] >> shift
        if shift + bits > WORD:
            code = code | runs[..., word + 1] << (WORD - shift)
        codes[..., i] = (code & (2**bits - 1)).to(torch.uint8)
    return codes.view(len(words), -1)[:, :count]


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits!r}")


def words_of(count: int, bits: int, *, whole_codes: bool = False) -> int:
    """Returns how many words a row of codes takes."""
    return -(-count // (WORD // bits)) if whole_codes else -(-count * bits // WORD)
