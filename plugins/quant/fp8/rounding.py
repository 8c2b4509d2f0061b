"""Numbers of eight bits: a sign, four bits of exponent, three of mantissa, and no infinity (e4m3fn).

Format: Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.  Whatever dtype goes in,
scales and codes are computed in float32.
"""

from __future__ import annotations

from typing import Final

import torch

DTYPE: Final = torch.float8_e4m3fn
MAX: Final = 448.0


def encode(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round x / scale to the nearest code, to the even one of two, and to ±448 beyond that.

    :param scale: float32 above 0, broadcast to x.
    :return: float8_e4m3fn; NaN where x is.
    """
    # What lies beyond the range is NaN to some devices and 448 to others.
    return (x.float() / scale).clamp(-MAX, MAX).to(DTYPE)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply in float32.

    :param codes: float8_e4m3fn.
    :param scale: float32, broadcast to the codes.
    """
    return codes.float() * scale


def widen(codes: torch.Tensor) -> torch.Tensor:
    """Convert codes that are not NaN to float32, on CPUs several times as fast as torch does.

    A code has the bits of a float16 that is a 256th of it, but for four of exponent instead of five.

    :param codes: float8_e4m3fn.
    """
    if codes.device.type != "cpu":
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16)
    bits <<= 7
    bits &= ~(1 << 14)  # the sign, which the conversion to int16 has repeated
    return bits.view(torch.float16).float().mul_(256)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round x to what its codes stand for, in its own dtype."""
    return decode(encode(x, scale), scale).to(x.dtype)


def scale_of(amax: torch.Tensor, *, power_of_two: bool = False) -> torch.Tensor:
    """Choose the scale that brings the largest magnitude to 448, or 1 if there is nothing but zeros.

    :param amax: largest magnitudes.
    :param power_of_two: take the next power of two from there on (ue8m0).
    :return: float32, of amax's shape; not finite where amax is not.
    """
    scale = amax.float() / MAX
    if power_of_two:
        scale = _next_power_of_two(scale)
    # A magnitude can also be too small for its scale to be above 0.
    return torch.where(scale == 0, 1.0, scale)


def _next_power_of_two(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)  # 0.5 <= mantissa < 1
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    power = torch.ldexp(torch.ones_like(x), exponent)
    return torch.where((x > 0) & x.isfinite(), power, x)
