"""How GPTQ checkpoints, and packed ones of compressed-tensors, are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from core.errors import CheckpointError
from core.interfaces import Axis, TensorSpec
from core.model.linear import PlainScheme
from plugins.quant.gptq.layouts import LAYOUTS
from plugins.quant.gptq.linear import PackedLinear, PackedPart, PlainPart

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    from core.interfaces import LinearSpec
    from plugins.quant.gptq.formats import LayerFormat

_PLAIN: Final = PlainScheme()


class GptqScheme:
    """Fulfils `core.interfaces.QuantScheme` for packed codes of 1 to 8 bits.

    The shards of a layer need not agree: each keeps its own bits, groups and order.

    :param format_of: tells how a stored layer is quantized, by its prefix; `None` if it is not.
    """

    def __init__(self, format_of: Callable[[str], LayerFormat | None]) -> None:
        self._format_of = format_of

    def make_linear(self, spec: LinearSpec, /) -> nn.Module:
        """Make an empty layer."""
        layouts = [self._format_of(prefix) for prefix, _ in spec.shards]
        if not any(layouts):
            return _PLAIN.make_linear(spec)
        return PackedLinear(spec, layouts)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name what a shard's layout stores, and `bias`, which GPTQ may store where there is none."""
        prefix, num_outputs = spec.shards[shard]
        layout = self._format_of(prefix)
        plain = _PLAIN.tensors(spec, shard)
        if layout is None:
            return plain
        tensors = LAYOUTS[layout.layout].describe((num_outputs, spec.in_features), layout)
        if spec.bias:
            tensors["bias"] = plain["bias"]
        elif layout.layout != "pack-quantized":
            tensors["bias"] = TensorSpec((num_outputs,), axes=(Axis("out"),), optional=True)
        return tensors

    def load(
        self,
        module: nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Copy a shard's codes, scales and zero points, and its bias.

        :raises CheckpointError: a value is impossible or contradicts the config.
        """
        if not isinstance(module, PackedLinear):
            _PLAIN.load(module, spec, shard, tensors)
            return
        part = module.shards[shard]
        if isinstance(part, PlainPart):
            part.weight.copy_(tensors["weight"])
        else:
            stored = LAYOUTS[part.layout.layout].read(tensors, spec, shard, part.layout)
            part.fill(stored)
        if module.bias is not None:
            module.bias[spec.rows(shard)].copy_(tensors["bias"])
        elif "bias" in tensors:
            _expect_no_bias(tensors["bias"], spec.shards[shard][0])

    def finalize(self, module: nn.Module, _spec: LinearSpec, /) -> None:
        """Make weights of the random bits that stand in for a checkpoint."""
        if isinstance(module, PackedLinear):
            for part in module.shards:
                if isinstance(part, PackedPart) and not part.is_filled:
                    part.settle()


def _expect_no_bias(bias: torch.Tensor, prefix: str) -> None:
    """Pass over a bias of zeros, which older tools write for every layer."""
    if bias.any():
        raise CheckpointError(f"{prefix}.bias is not zero, but the model has no bias there")
