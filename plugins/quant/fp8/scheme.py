"""How FP8 checkpoints are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from core.errors import CheckpointError
from core.interfaces import Axis, TensorSpec
from core.model.linear import PlainScheme
from core.sharding import local_groups
from plugins.quant.fp8.linear import Fp8Linear
from plugins.quant.fp8.rounding import DTYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from core.interfaces import LinearSpec
    from plugins.quant.fp8.formats import LayerFormat

SCALE_NAMES: Final = ("weight_scale", "weight_scale_inv")
"""The same under two names: a weight is its code times this number, whatever `inv` says."""
INPUT_SCALE_NAMES: Final = ("input_scale", "activation_scale")
_SCALE_DTYPES: Final = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e8m0fnu,
)
_PLAIN: Final = PlainScheme()


class Fp8Scheme:
    """Fulfils `core.interfaces.QuantScheme` for weights that are stored in FP8.

    :param format_of: tells how a layer is stored; `None` if it is not quantized.
    """

    def __init__(self, format_of: Callable[[LinearSpec], LayerFormat | None]) -> None:
        self._format_of = format_of

    def make_linear(self, spec: LinearSpec, /) -> nn.Module:
        """Make an empty layer."""
        layout = self._format_of(spec)
        return _PLAIN.make_linear(spec) if layout is None else Fp8Linear(spec, layout)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name `weight`, its scale and that of the inputs under each of their names, and `bias`."""
        layout = self._format_of(spec)
        plain = _PLAIN.tensors(spec, shard)
        if layout is None:
            return plain
        shape = (spec.shards[shard][1], spec.in_features)
        tensors = {"weight": TensorSpec(shape, DTYPE, (Axis("out"), Axis("in")))}
        tensors |= dict.fromkeys(SCALE_NAMES, _describe_scale(shape, layout.block))
        input_scale = TensorSpec((1,), _SCALE_DTYPES, optional=True, can_broadcast=True)
        return {**plain, **tensors, **dict.fromkeys(INPUT_SCALE_NAMES, input_scale)}

    def load(
        self,
        module: nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Copy a shard's codes, its scales for each output feature, and its bias.

        :raises CheckpointError: a scale is missing or out of range, or a weight is NaN.
        """
        if not isinstance(module, Fp8Linear):
            _PLAIN.load(module, spec, shard, tensors)
            return
        name, rows = spec.shards[shard][0], spec.rows(shard)
        if has_nan(tensors["weight"]):
            raise CheckpointError(f"{name}.weight holds NaN")
        module.weight[rows].copy_(tensors["weight"])
        scale = _find_scale(tensors, SCALE_NAMES, name, can_be_zero=True)
        if module.layout.block is None:
            scale = scale.reshape(-1, 1)
        else:
            blocks = local_groups(spec.output_spans(shard), module.layout.block[0])
            scale = scale[torch.tensor(blocks, device=scale.device)]
        module.weight_scale[rows].copy_(scale)
        if module.layout.inputs == "static":
            input_scale = _find_scale(tensors, INPUT_SCALE_NAMES, name, can_be_zero=False)
            module.input_scale[shard].copy_(input_scale.squeeze())
        if module.bias is not None:
            module.bias[rows].copy_(tensors["bias"])

    def finalize(self, module: nn.Module, _spec: LinearSpec, /) -> None:
        """See which shards round their inputs alike."""
        if isinstance(module, Fp8Linear) and module.layout.inputs == "static":
            module.find_static_parts()


def has_nan(codes: torch.Tensor) -> bool:
    """Whether one of the codes is NaN.

    :param codes: float8_e4m3fn.
    """
    return bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any())


def _describe_scale(shape: tuple[int, int], block: tuple[int, int] | None) -> TensorSpec:
    if block is None:
        return TensorSpec(shape[:1], _SCALE_DTYPES, (Axis("out"),), optional=True, can_broadcast=True)
    num_blocks = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    axes = (Axis("out", block[0], shared=True), Axis("in", block[1], shared=True))
    return TensorSpec(num_blocks, _SCALE_DTYPES, axes, optional=True)


def _find_scale(
    tensors: Mapping[str, torch.Tensor], names: tuple[str, ...], prefix: str, *, can_be_zero: bool
) -> torch.Tensor:
    """Take the tensor that goes by one of the names.

    :raises CheckpointError: none or several do, or a number is out of range.
    """
    found = [name for name in names if name in tensors]
    if len(found) != 1:
        known = " and ".join(f"{prefix}.{name}" for name in names)
        raise CheckpointError(
            f"exactly one of {known} is needed, but the checkpoint holds {len(found)}"
        )
    scale = tensors[found[0]].float()
    is_legal = (scale >= 0 if can_be_zero else scale > 0) & scale.isfinite()
    if not is_legal.all():
        raise CheckpointError(
            f"{prefix}.{found[0]} holds {scale[~is_legal][0].item():g}, but a scale has to be finite and "
            f"{'not below' if can_be_zero else 'above'} 0"
        )
    return scale
