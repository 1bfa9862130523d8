"""Codes of a few bits, one behind the other in 32-bit words: how packed checkpoints hold them."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n), integers below ``2^bits``, as little-endian streams of bits: int32 (rows, ceil(n * bits / 32)).

    Code i of a row has bits ``i * bits`` and up of its row's stream; what is left of the last word is 0.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``codes`` are not (rows, n) and below ``2^bits``.
    """
    _check_bits(bits)
    if codes.dim() != 2 or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits):
        raise ValueError(f"codes must be (rows, n) and from 0 to {2**bits - 1}, got shape {tuple(codes.shape)}")
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
    return signed.view(rows, -1)[:, : _words(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of every row, uint8 (rows, count), of what :func:`pack` made.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``words`` are not int32 (rows, ceil(count * bits / 32)).
    """
    _check_bits(bits)
    expected = _words(count, bits)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != expected:
        raise ValueError(f"words must be int32 (rows, {expected}), got {words.dtype} of shape {tuple(words.shape)}")
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


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)
