"""Small integers packed into 32-bit words.

Along the packed dimension the codes form one stream of bits, lowest bit first: code k occupies bits
k · bits to (k + 1) · bits - 1 of it.  For 2, 4 and 8 bits that puts 16, 8 and 4 codes into each word,
for 3 bits 32 codes into three words, two of which split a code.
"""

from __future__ import annotations

import math
from typing import Final

import torch

WORD_BITS: Final = 32


def codes_per_period(bits: int) -> int:
    """Fewest codes that fill whole words."""
    return WORD_BITS // math.gcd(bits, WORD_BITS)


def pack(codes: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Pack codes along one dimension, whose size is a multiple of `codes_per_period(bits)`.

    :param codes: integers, 0 to 2 ** bits - 1.
    :return: int32, `bits` / 32 as many along `dim`.
    :raises ValueError: the size is no such multiple.
    """
    codes = codes.movedim(dim, -1).to(torch.int64)
    period = codes_per_period(bits)
    if codes.shape[-1] % period:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole words of 32 bits")
    codes = codes.unflatten(-1, (-1, period))
    words = codes.new_zeros((*codes.shape[:-1], period * bits // WORD_BITS))
    for k in range(period):
        word, shift = divmod(k * bits, WORD_BITS)
        words[..., word] |= codes[..., k] << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= codes[..., k] >> (WORD_BITS - shift)
    words = words.flatten(-2) & 0xFFFFFFFF
    words = torch.where(words >= 1 << 31, words - (1 << WORD_BITS), words)
    return words.to(torch.int32).movedim(-1, dim).contiguous()


def unpack(words: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Undo `pack`.

    :param words: int32.
    :return: int32, 0 to 2 ** bits - 1, 32 / `bits` as many along `dim`.
    """
    if WORD_BITS % bits == 0:
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
        codes = words.movedim(dim, -1).unsqueeze(-1) >> shifts
        codes &= (1 << bits) - 1
        return codes.flatten(-2).movedim(-1, dim).contiguous()
    words = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    period = codes_per_period(bits)
    words = words.unflatten(-1, (-1, period * bits // WORD_BITS))
    codes = words.new_empty((*words.shape[:-1], period))
    for k in range(period):
        word, shift = divmod(k * bits, WORD_BITS)
        code = words[..., word] >> shift
        if shift + bits > WORD_BITS:
            code = code | words[..., word + 1] << (WORD_BITS - shift)
        codes[..., k] = code & ((1 << bits) - 1)
    return codes.flatten(-2).to(torch.int32).movedim(-1, dim).contiguous()
