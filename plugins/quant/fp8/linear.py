"""A linear layer over FP8 weights, which may round its inputs to FP8 too."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from core.model.linear import make_weight
from core.quant.linear import DequantizedLinear
from core.sharding import covering
from plugins.quant.fp8.blocks import ROWS_AT_ONCE, in_groups, spread
from plugins.quant.fp8.rounding import DTYPE, fake_quantize, scale_of, widen

if TYPE_CHECKING:
    from core.interfaces import LinearSpec
    from plugins.quant.fp8.formats import LayerFormat


class StaticPart(NamedTuple):
    """Outputs whose inputs are quantized alike."""

    rows: slice
    shard: int
    """Whose `input_scale` it is."""


class Fp8Linear(DequantizedLinear):
    """y = q(x) Wᵀ + b, where W is code · scale and q rounds to FP8, or does nothing.

    Scales are kept for each output feature, so that the shards of a fused layer keep their own.  A
    product of code and scale is computed in float32 and rounded to the dtype of activations once.

    :param layout: what shares a scale, and how inputs are rounded.
    """

    def __init__(self, spec: LinearSpec, layout: LayerFormat) -> None:
        super().__init__(spec)
        (inputs,) = spec.input_spans
        self.layout = layout
        self.in_features = spec.in_features
        self.lead = inputs.start
        """Input features of the whole layer that come before those of this rank."""
        self.static_parts: list[StaticPart] = []
        self._rows = [spec.rows(shard) for shard in range(len(spec.shards))]
        num_groups = 1
        if layout.block is not None:
            (groups,) = covering((inputs,), layout.block[1])
            num_groups = groups.size
        self.weight = make_weight((spec.out_features, spec.in_features), DTYPE, spec.device)
        self.weight_scale = self._add_scale("weight_scale", (spec.out_features, num_groups), spec)
        if layout.inputs == "static":
            self.input_scale = self._add_scale("input_scale", (len(spec.shards),), spec)

    def _add_scale(self, name: str, shape: tuple[int, ...], spec: LinearSpec) -> torch.Tensor:
        scale = torch.empty(shape, dtype=torch.float32, device=spec.device)
        self.register_buffer(name, scale)
        return scale

    def find_static_parts(self) -> None:
        """Join neighbouring shards whose inputs have the same scale; waits for the device."""
        scales = self.input_scale.tolist()
        parts: list[StaticPart] = []
        for shard, rows in enumerate(self._rows):
            if parts and scales[parts[-1].shard] == scales[shard]:
                parts[-1] = StaticPart(slice(parts[-1].rows.start, rows.stop), parts[-1].shard)
            else:
                parts.append(StaticPart(rows, shard))
        self.static_parts = parts

    def scale_per_input(self, scale: torch.Tensor) -> torch.Tensor:
        """Bring scales of some outputs, [N, groups], to a form that is broadcast to [N, in_features]."""
        if self.layout.block is None:
            return scale
        size = self.layout.block[1]
        return spread(scale, size, self.lead % size, self.in_features)

    def dequantize(self) -> torch.Tensor:
        """Make the weight: [out_features, in_features] in the dtype of activations."""
        weight = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)
        parts = zip(
            *(x.split(ROWS_AT_ONCE) for x in (self.weight, self.weight_scale, weight)), strict=True
        )
        for codes, scale, out in parts:  # rather than a float32 copy of it all
            torch.mul(widen(codes), self.scale_per_input(scale), out=out)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the last dimension."""
        weight = self.dequantize()
        if self.layout.inputs == "static":
            return self._forward_static(x, weight)
        if self.layout.inputs == "dynamic":
            x = fake_quantize(x, self._dynamic_scale(x))
        return functional.linear(x, weight, self.bias)

    def _forward_static(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parts = []
        for rows, shard in self.static_parts:
            rounded = fake_quantize(x, self.input_scale[shard])
            bias = None if self.bias is None else self.bias[rows]
            parts.append(functional.linear(rounded, weight[rows], bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _dynamic_scale(self, x: torch.Tensor) -> torch.Tensor:
        """Choose scales from the inputs: of each token, or of each of its groups."""
        size, power_of_two = self.layout.group_size, self.layout.power_of_two
        if size is None:
            return scale_of(x.abs().amax(-1, keepdim=True), power_of_two=power_of_two)
        lead = self.lead % size
        scale = scale_of(in_groups(x.abs(), size, lead).amax(-1), power_of_two=power_of_two)
        return spread(scale, size, lead, self.in_features)
