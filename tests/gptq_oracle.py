"""An independent GPTQ format for the tests of quant.gptq, one code at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


def pack_row(codes, bits):
    """Pack codes as one long number, the first in its lowest bits, cut into words of 32 bits."""
    number = sum(int(code) << bits * index for index, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return np.array([number >> 32 * word & 0xFFFFFFFF for word in range(count)], np.uint32)


def pack_columns(codes, bits):
    """[N, K] -> [words, K] int32."""
    columns = [pack_row(column, bits) for column in np.asarray(codes).T]
    return torch.from_numpy(np.stack(columns, 1).view(np.int32).copy())


def pack_rows(codes, bits):
    """[K, N] -> [K, words] int32."""
    return pack_columns(np.asarray(codes).T, bits).T.contiguous()


@dataclass(frozen=True)
class Rounded:
    """A weight rounded to the nearest code."""

    codes: np.ndarray  # [outputs, inputs]
    scales: np.ndarray  # [outputs, groups] float16
    zeros: np.ndarray  # [outputs, groups]
    groups: np.ndarray  # [inputs]

    def weight(self):
        """What is stored, in float64."""
        offsets = self.codes - self.zeros[:, self.groups]
        return torch.from_numpy(offsets * self.scales.astype(np.float64)[:, self.groups])


def round_weight(weight, bits, group_size=-1, *, symmetric=True, order=None):
    """Round a weight [outputs, inputs].

    :param order: a permutation of the inputs, consecutive ones of which form a group.
    """
    weight = np.asarray(weight, np.float64)
    num_inputs = weight.shape[1]
    size = num_inputs if group_size == -1 else group_size
    order = np.arange(num_inputs) if order is None else np.asarray(order)
    groups = np.empty(num_inputs, np.int64)
    groups[order] = np.arange(num_inputs) // size
    count = -(-num_inputs // size)
    scales = np.ones((len(weight), count), np.float16)
    zeros = np.full((len(weight), count), 1 << bits - 1)
    codes = np.empty(weight.shape, np.int64)
    top = (1 << bits) - 1
    for group in range(count):
        part = weight[:, groups == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, group] = 2 * np.maximum(-low, high) / top + 1e-7
        else:
            scales[:, group] = (high - low) / top + 1e-7
            zeros[:, group] = np.clip(np.round(-low / scales[:, group]), 0, top)
        scale, zero = scales[:, [group]].astype(np.float64), zeros[:, [group]]
        codes[:, groups == group] = np.clip(np.round(part / scale) + zero, 0, top)
    return Rounded(codes, scales, zeros, groups)


def store_gptq(rounded, bits, *, version=1):
    """Make the tensors of a GPTQ checkpoint."""
    zeros = rounded.zeros.T - (version == 1)
    return {
        "qweight": pack_columns(rounded.codes.T, bits),
        "qzeros": pack_rows(zeros & (1 << bits) - 1, bits),
        "scales": torch.from_numpy(rounded.scales.T.copy()),
        "g_idx": torch.from_numpy(rounded.groups.astype(np.int32)),
    }


def store_packed(rounded, bits, *, symmetric=True, with_order=False):
    """Make the tensors of the format pack-quantized of compressed-tensors."""
    tensors = {
        "weight_packed": pack_rows(rounded.codes, bits),
        "weight_scale": torch.from_numpy(rounded.scales.copy()),
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_columns(rounded.zeros, bits)
    if with_order:
        tensors["weight_g_idx"] = torch.from_numpy(rounded.groups.astype(np.int32))
    return tensors
