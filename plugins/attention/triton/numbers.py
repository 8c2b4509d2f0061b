"""Arithmetic that several kernels share: FP8 codes, softcap, rotation.

FP8 is E4M3 of the OCP 8-bit Floating Point Specification (OFP8) 1.0.  The cache holds its codes as
plain bytes: not every card has the type, and rounding by integer arithmetic gives the same codes
on all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
"""Softmax is computed with powers of two, which the hardware has."""

LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
"""Where a running maximum begins: finite, as the difference of two infinities is NaN."""

FP8_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def narrow(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Divide by a scale and round to the nearest FP8 code, ties to even; too large saturates.

    :param x: float32.
    :param scale: float32.
    :return: the codes, uint8; NaN stays NaN.
    """
    size = tl.abs(x / scale)
    is_nan = size != size
    size = tl.where(size > FP8_MAX, FP8_MAX, size)
    bits = size.to(tl.int32, bitcast=True)
    # Mantissas lose 20 of 23 bits; the bias of the exponent changes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the last place of a float32 near 2^14.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(is_nan, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def widen(codes: tl.tensor, dtype: tl.constexpr, HAS_FP8: tl.constexpr) -> tl.tensor:
    """Convert FP8 codes to numbers, without a scale.

    :param codes: uint8.
    :param HAS_FP8: whether the card converts them itself.
    """
    if HAS_FP8:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(dtype)
    else:
        code = codes.to(tl.int16)
        # The same bits, read as a float16, are the number divided by 2^(15 - 7).
        half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)
        number = tl.where((code & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
        return number.to(dtype)


@triton.jit
def stored(x: tl.tensor, scale: tl.tensor, IS_NARROW: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Round a key or value to what the cache holds of it.

    :param x: float32.
    :param scale: float32, by which FP8 codes are multiplied when read.
    :return: codes, or numbers of `dtype`.
    """
    if IS_NARROW:
        return narrow(x, scale)
    else:
        return x.to(dtype)


@triton.jit
def cap(scores: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Bend scores: softcap · tanh(scores / softcap)."""
    doubled = tl.exp2(scores * (2.0 * LOG2_E / SOFTCAP))
    return SOFTCAP - (2.0 * SOFTCAP) / (doubled + 1.0)
