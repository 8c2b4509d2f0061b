"""Keys and values in a narrower dtype than the model's: rounded when written, widened when read.

FP8 is E4M3 of the OCP 8-bit Floating Point Specification (OFP8) 1.0: one code, `float8_e4m3fn`, has
four exponent bits, three mantissa bits, a largest value of 448, a NaN and no infinity.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

FP8: Final = torch.float8_e4m3fn
_PAIRS: Final = {
    torch.bfloat16: torch.int32,
    torch.float16: torch.int32,
    torch.float32: torch.int64,
    torch.float64: torch.complex128,
}
"""A dtype that is as wide as two numbers of a dtype."""


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to move numbers of `dtype` about in: not all devices can index FP8."""
    return torch.uint8 if dtype == FP8 else dtype


def narrow(x: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None) -> torch.Tensor:
    """Divide by the scales and round to the nearest, ties to even.

    What is too large becomes the largest number of the dtype, infinity too; NaN stays NaN.

    :param x: [T, G, D] floating.
    :param scales: [G] float32, or `None` for ones.
    :return: [T, G, D], contiguous unless it is `x` itself.
    """
    if scales is None and dtype == x.dtype:
        return x
    # At least float32: in bfloat16 the largest number of float16 is rounded up, beyond its range.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scales is not None:
        wide = wide / scales[:, None]
    limit = torch.finfo(dtype).max
    if torch.finfo(wide.dtype).max > limit:
        wide = wide.clamp(-limit, limit)
    return wide.to(dtype).contiguous()


def widen(stored: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Convert to the dtype of `out`, without scales.

    :param stored: contiguous.
    :param out: contiguous and of the same shape; overwritten and returned.
    """
    if stored.dtype != FP8 or stored.device.type != "cpu" or stored.numel() % 2:
        return out.copy_(stored)
    # Two codes at a time from a table, as torch takes ten times as long to convert them one by one.
    codes = stored.flatten().view(torch.uint16).to(torch.int32)
    pairs = out.flatten().view(_PAIRS[out.dtype])
    torch.index_select(_pair_table(out.dtype), 0, codes, out=pairs)
    return out


def rescale(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Multiply the query heads of each group by the scale of their key-value head.

    :param x: [T, H, D].
    :param scales: [G] float32, or `None` for ones.
    :return: [T, H, D] in x's dtype.
    """
    if scales is None:
        return x
    groups: torch.Tensor = x.unflatten(1, (len(scales), -1))
    return (groups * scales[:, None, None]).to(x.dtype).flatten(1, 2)


@cache
def _pair_table(dtype: torch.dtype) -> torch.Tensor:
    """List the numbers that any two codes stand for: [65536], each a pair."""
    with torch.inference_mode(mode=False):  # it outlives whatever mode it is first wanted in
        codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
        table: torch.Tensor = codes.view(torch.uint8).view(FP8).to(dtype).view(_PAIRS[dtype])
        return table
