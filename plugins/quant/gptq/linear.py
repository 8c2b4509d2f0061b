"""A linear layer of packed codes, each of whose shards is stored in its own way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from core.model.linear import make_weight
from core.quant.linear import DequantizedLinear
from core.quant.packing import unpack
from plugins.quant.gptq.stored import groups_in_order, word_span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.interfaces import LinearSpec
    from plugins.quant.gptq.formats import LayerFormat
    from plugins.quant.gptq.stored import Stored

ROWS_AT_ONCE: Final = 1024
"""Output features that are dequantized at a time, which bounds the integers and float32 copies."""


class PlainPart(nn.Module):
    """A shard that is stored as it is, beside others that are not."""

    def __init__(self, spec: LinearSpec, num_rows: int) -> None:
        super().__init__()
        self.weight = make_weight((num_rows, spec.in_features), spec.dtype, spec.device)

    def write_weight(self, out: torch.Tensor) -> None:
        """Copy."""
        out.copy_(self.weight)


class PackedPart(nn.Module):
    """A shard of packed codes: w = (code - zero point) · scale, computed in float32."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, spec: LinearSpec, num_rows: int, layout: LayerFormat) -> None:
        super().__init__()
        (inputs,) = spec.input_spans
        words, self.lead = word_span(inputs, layout.bits)
        self.layout = layout
        self.num_inputs = inputs.size
        self.is_filled = False
        shape = (num_rows, layout.num_groups(inputs))
        device = spec.device
        codes = torch.empty((num_rows, words.size), dtype=torch.int32, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.empty(shape, dtype=torch.float16, device=device))
        zeros = None if layout.symmetric else torch.empty(shape, dtype=torch.uint8, device=device)
        self.register_buffer("zeros", zeros)
        # No buffer: dummy weights would be drawn for it.
        self.groups = groups_in_order(inputs, layout.group_size, device)

    def fill(self, stored: Stored) -> None:
        """Take a shard over; scales keep their dtype."""
        self.codes.copy_(stored.codes)
        self.scales = stored.scales.clone(memory_format=torch.contiguous_format)
        if stored.zeros is not None:
            self.zeros = stored.zeros.contiguous()
        if stored.groups is not None:
            self.groups = stored.groups
        self.is_filled = True

    def settle(self) -> None:
        """Turn random bits into weights with the mean and variance that random weights are to have.

        The middle is half a code above the mean of all codes, so signs alternate: with a mean of their
        own, all rows of few bits would look for the same direction of the input.
        """
        rows, groups = (torch.arange(size, device=self.scales.device) for size in self.scales.shape)
        signs = 1 - 2 * ((rows.unsqueeze(1) + groups) % 2)
        self.scales *= signs * (math.sqrt(3) / self.layout.middle)
        if self.zeros is not None:
            self.zeros.fill_(self.layout.middle)

    def write_weight(self, out: torch.Tensor) -> None:
        """Compute the weight.

        :param out: [outputs of the shard, inputs], of any floating dtype.
        """
        for start in range(0, len(out), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            codes = unpack(self.codes[rows], self.layout.bits)
            codes = self._by_group(codes[:, self.lead : self.lead + self.num_inputs])
            if self.zeros is None:
                codes -= self.layout.middle
            else:
                codes -= self._per_input(self.zeros[rows])
            scales = self._per_input(self.scales[rows].float())
            torch.mul(codes, scales, out=self._by_group(out[rows]))

    def _by_group(self, matrix: torch.Tensor) -> torch.Tensor:
        """View [N, inputs] as [N, G, inputs of a group] where all groups are whole and in order."""
        if self.groups is not None:
            return matrix
        groups: torch.Tensor = matrix.unflatten(1, (self.scales.shape[1], -1))
        return groups

    def _per_input(self, values: torch.Tensor) -> torch.Tensor:
        """Bring values of groups, [N, G], to a form that is broadcast to what `_by_group` returns."""
        return values.unsqueeze(-1) if self.groups is None else values[:, self.groups]


class PackedLinear(DequantizedLinear):
    """Computes with a weight that is made anew at every use.

    :param layouts: of each shard; `None`: it is stored as it is.
    """

    def __init__(self, spec: LinearSpec, layouts: Sequence[LayerFormat | None]) -> None:
        super().__init__(spec)
        self.device = spec.device
        self.shape = (spec.out_features, spec.in_features)
        self.shards = [
            PlainPart(spec, size) if layout is None else PackedPart(spec, size, layout)
            for (_, size), layout in zip(spec.shards, layouts, strict=True)
        ]
        self._registered = nn.ModuleList(self.shards)
        self._rows = [spec.rows(shard) for shard in range(len(spec.shards))]

    def dequantize(self) -> torch.Tensor:
        """Make the weight: [out_features, in_features] in the dtype of activations."""
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for shard, rows in zip(self.shards, self._rows, strict=True):
            shard.write_weight(weight[rows])
        return weight
