"""A linear layer that dequantizes its weight at every use: exact by definition, on any device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from core.model.linear import make_weight

if TYPE_CHECKING:
    import torch

    from core.interfaces import LinearSpec


class DequantizedLinear(nn.Module, ABC):
    """y = x Wᵀ + b, where W is made anew from what is stored: the oracle of faster kernels."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.dtype = spec.dtype
        self.bias = make_weight((spec.out_features,), spec.dtype, spec.device) if spec.bias else None

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """Make the weight: [out_features, in_features] in the dtype of activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the last dimension."""
        return functional.linear(x, self.dequantize(), self.bias)
