"""Linear layers whose weights are stored as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from core.interfaces import Axis, LinearSpec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping


class PlainLinear(nn.Module):
    """y = x Wᵀ + b.

    :param spec: its shards lie one below the other in `weight`: [out_features, in_features].
    """

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.weight = make_weight((spec.out_features, spec.in_features), spec.dtype, spec.device)
        self.bias = make_weight((spec.out_features,), spec.dtype, spec.device) if spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the last dimension."""
        return functional.linear(x, self.weight, self.bias)


class PlainScheme:
    """Fulfils `core.interfaces.QuantScheme` without quantizing."""

    def make_linear(self, spec: LinearSpec, /) -> PlainLinear:
        """Make an empty layer."""
        return PlainLinear(spec)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name `weight`, and `bias` if there is one."""
        _, out_features = spec.shards[shard]
        shape, axes = (out_features, spec.in_features), (Axis("out"), Axis("in"))
        tensors = {"weight": TensorSpec(shape, axes=axes)}
        if spec.bias:
            tensors["bias"] = TensorSpec((out_features,), axes=(Axis("out"),))
        return tensors

    def load(
        self,
        module: nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Copy a shard to its rows, converting the dtype."""
        for name, tensor in tensors.items():
            module.get_parameter(name)[spec.rows(shard)].copy_(tensor)

    def finalize(self, module: nn.Module, spec: LinearSpec, /) -> None:
        """Do nothing: the weights are used as they were loaded."""


def make_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Make an uninitialized weight that is never trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
