"""How AWQ's GEMM layout packs eight codes of four bits into a word.

Consecutive output features share a word.  Its low half holds the even ones of the eight, its high
half the odd ones, so that a kernel finds two neighbours by one mask in the halves of a word.

Layout: AutoAWQ, `WQLinear_GEMM`.
"""

from __future__ import annotations

from typing import Final

import torch

from core.quant import packing
from plugins.quant.awq.config import BITS, CODES_PER_WORD

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight consecutive codes is in each nibble of a word, lowest nibble first."""


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes along the last dimension, whose size is a multiple of 8.

    :param codes: [..., N] integers, 0 to 15.
    :return: [..., N / 8] int32.
    :raises ValueError: the size is no such multiple.
    """
    if codes.shape[-1] % CODES_PER_WORD:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole words of {CODES_PER_WORD}")
    by_word = codes.unflatten(-1, (-1, CODES_PER_WORD))
    return packing.pack(by_word[..., list(ORDER)].flatten(-2), BITS)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Undo `pack`.

    :param words: [..., N] int32.
    :return: [..., 8 N] int32, 0 to 15.
    """
    # On the device and without a permutation: this runs at every use of a layer.
    code = torch.arange(CODES_PER_WORD, dtype=torch.int32, device=words.device)
    nibble = code % 2 * (CODES_PER_WORD // 2) + code // 2
    codes = words.unsqueeze(-1) >> nibble * BITS
    return codes.bitwise_and_((1 << BITS) - 1).flatten(-2)
