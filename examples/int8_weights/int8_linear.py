"""The layer that holds int8, and the scheme that fills it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from core.interfaces import Axis, LinearSpec, TensorSpec
from core.model.linear import PlainScheme, make_weight
from core.quant.linear import DequantizedLinear
from core.quant.names import ask_shards, matches_any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

LARGEST: Final = 127


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round each row to multiples of its scale, which maps its largest magnitude to 127.

    :param weight: [out, in] floating.
    :return: `weight` [out, in] int8, -127 to 127, and `scale` [out] float32.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros has none
    return {"weight": torch.round(weight / scale[:, None]).to(torch.int8), "scale": scale}


class Int8Linear(DequantizedLinear):
    """Holds `weight` [out, in] int8 and `scale` [out] float32."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        shape = (spec.out_features, spec.in_features)
        self.weight = make_weight(shape, torch.int8, spec.device)
        self.scale = make_weight(shape[:1], torch.float32, spec.device)

    def dequantize(self) -> torch.Tensor:
        """Multiply in float32 and round once."""
        return (self.weight * self.scale[:, None]).to(self.dtype)


class Int8Scheme:
    """Fulfils `core.interfaces.QuantScheme`; layers that are ignored are those of unquantized models.

    :param is_stored: whether the checkpoint holds codes; else it holds weights, which `load` converts.
    :param ignored: patterns of `core.quant.names.matches`.
    """

    def __init__(self, *, is_stored: bool, ignored: tuple[str, ...]) -> None:
        self._is_stored = is_stored
        self._ignored = ignored
        self._plain = PlainScheme()

    def _is_ignored(self, spec: LinearSpec) -> bool:
        return ask_shards(spec, lambda name: matches_any(name, self._ignored), "ignore")

    def make_linear(self, spec: LinearSpec, /) -> nn.Module:
        """Make an empty layer."""
        return self._plain.make_linear(spec) if self._is_ignored(spec) else Int8Linear(spec)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name what an unquantized layer has, or codes in place of weights, and scales."""
        tensors = dict(self._plain.tensors(spec, shard))
        if self._is_stored and not self._is_ignored(spec):
            shape, axes = tensors["weight"].shape, tensors["weight"].axes
            tensors["weight"] = TensorSpec(shape, torch.int8, axes)
            tensors["scale"] = TensorSpec(shape[:1], torch.float32, (Axis("out"),))
        return tensors

    def load(
        self,
        module: nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Copy a shard to its rows, converted first if the checkpoint holds weights."""
        if isinstance(module, Int8Linear) and not self._is_stored:
            tensors = {**tensors, **quantize(tensors["weight"])}
        self._plain.load(module, spec, shard, tensors)

    def finalize(self, module: nn.Module, spec: LinearSpec, /) -> None:
        """Do nothing: codes are used as they were loaded."""
