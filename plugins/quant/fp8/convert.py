"""How unquantized checkpoints become FP8 while they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from core.interfaces import Axis, TensorSpec
from core.model.linear import PlainScheme
from core.sharding import Span, covering
from plugins.quant.fp8.blocks import BLOCK_SIZE, ROWS_AT_ONCE, block_of, block_scales
from plugins.quant.fp8.formats import HEAD_ROLE, LayerFormat
from plugins.quant.fp8.linear import Fp8Linear
from plugins.quant.fp8.rounding import encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from core.interfaces import LinearSpec
    from plugins.quant.fp8.formats import Strategy

_PLAIN = PlainScheme()


class ConvertingScheme:
    """Fulfils `core.interfaces.QuantScheme` for weights that are stored in a float dtype.

    Each shard is quantized as it arrives, so that no more than one is in memory unquantized.  A rank
    reads more than its part, and chooses the scales from all that shares them: all ranks together
    hold what a single one would.

    :param strategy: what shares a scale of the weight.
    :param keep_inputs: do not round inputs to FP8.
    """

    def __init__(self, strategy: Strategy, *, keep_inputs: bool) -> None:
        self._strategy = strategy
        is_block = strategy == "block"
        self._layout = LayerFormat(
            block=(BLOCK_SIZE, BLOCK_SIZE) if is_block else None,
            inputs="keep" if keep_inputs else "dynamic",
            group_size=BLOCK_SIZE if is_block else None,
        )

    def make_linear(self, spec: LinearSpec, /) -> nn.Module:
        """Make an empty layer; `lm_head` stays unquantized."""
        return _PLAIN.make_linear(spec) if spec.role == HEAD_ROLE else Fp8Linear(spec, self._layout)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name `weight`, and `bias` if there is one."""
        tensors = _PLAIN.tensors(spec, shard)
        if spec.role == HEAD_ROLE:
            return tensors
        axes = (Axis("out"), None) if self._strategy == "channel" else ()
        return {**tensors, "weight": TensorSpec(tensors["weight"].shape, axes=axes)}

    def load(
        self,
        module: nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Quantize a shard.

        :raises CheckpointError: a weight is NaN or infinite.
        """
        if not isinstance(module, Fp8Linear):
            _PLAIN.load(module, spec, shard, tensors)
            return
        weight, rows = tensors["weight"], spec.rows(shard)
        block = block_of(self._strategy, weight.shape)
        scales = block_scales(weight, block, spec.shards[shard][0])
        (inputs,) = spec.input_spans
        (groups,) = covering((inputs,), block.columns)
        scales = scales[:, slice(*groups)]
        parts = zip(
            self._find_rows(weight, spec, shard).split(ROWS_AT_ONCE),
            module.weight[rows].split(ROWS_AT_ONCE),
            module.weight_scale[rows].split(ROWS_AT_ONCE),
            strict=True,
        )
        for source, codes, scale in parts:
            scale.copy_(scales[source // block.rows])
            codes.copy_(encode(weight[source, slice(*inputs)], module.scale_per_input(scale)))
        if module.bias is not None:
            module.bias[rows].copy_(tensors["bias"])

    def _find_rows(self, weight: torch.Tensor, spec: LinearSpec, shard: int) -> torch.Tensor:
        """Where this rank's outputs are in what was read: by channel no others were."""
        is_cut = self._strategy == "channel"
        spans = (Span(0, len(weight)),) if is_cut else spec.output_spans(shard)
        return torch.cat([torch.arange(*span, device=weight.device) for span in spans])

    def finalize(self, module: nn.Module, spec: LinearSpec, /) -> None:
        """Do nothing: the weights are used as they were quantized."""
