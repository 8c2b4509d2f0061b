"""An independent FP8 (e4m3) for the tests of quant.fp8: numpy and plain loops.

Scales and quotients are float32, as the plugin defines them; everything else is float64.
"""

from __future__ import annotations

import numpy as np


def fp8(x):
    """Round to four significant bits, or to a multiple of 2**-9 where that is coarser."""
    x = np.asarray(x, np.float32).astype(np.float64)
    exponent = np.maximum(np.floor(np.log2(np.where(x == 0, 1, np.abs(x)))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.round(x / step) * step, -448, 448)


def amax_scale(x):
    amax = np.float32(np.abs(x).max(initial=0))
    return np.float32(amax / np.float32(448)) or np.float32(1)


def quantize_dequantize(x, scale):
    x = np.asarray(x, np.float32)
    return (fp8(x / scale).astype(np.float32) * scale).astype(np.float64)


def round_inputs(x, *, scale=None, group=None, lead=0):
    """Round inputs [T, N] to FP8, with one scale or with dynamic ones."""
    if scale is not None:
        return quantize_dequantize(x, np.float32(scale))
    out = np.empty_like(x)
    group = group or x.shape[1] + lead
    for row in range(len(x)):
        for start in range(-(lead % group), x.shape[1], group):
            part = slice(max(start, 0), start + group)
            out[row, part] = quantize_dequantize(x[row, part], amax_scale(x[row, part]))
    return out


def quantize_weight(weight, block):
    """Quantize [R, C]: codes in float64, and scales [ceil(R / rows), ceil(C / columns)]."""
    weight = np.asarray(weight, np.float32)
    num_blocks = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
    codes, scales = np.zeros(weight.shape), np.zeros(num_blocks, np.float32)
    for i, j in np.ndindex(*num_blocks):
        part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        scales[i, j] = amax_scale(weight[part])
        codes[part] = fp8(weight[part] / scales[i, j])
    return codes, scales


def dequantize_weight(codes, scales, block):
    full = np.kron(scales, np.ones(block))[: codes.shape[0], : codes.shape[1]]
    return (codes.astype(np.float32) * full.astype(np.float32)).astype(np.float64)
