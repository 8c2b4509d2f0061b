"""The numbers that a group of weights is rounded to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

SMALLEST_SCALE: Final = 2.0**-24
"""Of float16, above 0."""
SHARES: Final = tuple(1 - step / 50 for step in range(1, 21))
"""Of the range of a group, smaller ones that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """(code - zero point) · scale, for codes of so many bits."""

    bits: int
    symmetric: bool

    @property
    def max_code(self) -> int:
        """Largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    def fit(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose scale and zero point of a group: those of `SHARES` that round with the least squares.

        A range that leaves out the largest weights has finer steps for all others.

        :param weights: [N, group_size] floating.
        :return: [N] both, in the dtype of the weights.
        """
        low, high = weights.amin(-1).clamp(max=0), weights.amax(-1).clamp(min=0)
        scale, zero = self.span(low, high)
        least = self._squares(weights, scale, zero)
        for share in SHARES:
            candidate = self.span(share * low, share * high)
            squares = self._squares(weights, *candidate)
            is_better = squares < least
            scale, zero = (
                torch.where(is_better, new, old)
                for new, old in zip(candidate, (scale, zero), strict=True)
            )
            least = torch.where(is_better, squares, least)
        return scale, zero

    def span(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute scale and zero point of a range: at most half a step of it is out of reach.

        Scales are rounded to float16 here, as they will be stored, and not afterwards.  Zero points of
        0 are avoided: engines do not agree on how they are stored.

        :param low: [N] floating, at most 0.
        :param high: [N] floating, at least 0.
        :return: [N] both, in the same dtype.
        """
        if self.symmetric:
            scale = _round_scale(2 * torch.maximum(-low, high) / self.max_code)
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        scale = _round_scale((high - low) / self.max_code)
        is_low = torch.round(-low / scale) < 1
        scale = torch.where(is_low, _round_scale((high - low) / (self.max_code - 1)), scale)
        return scale, torch.round(-low / scale).clamp(1, self.max_code)

    def _squares(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        return ((self.encode(weights, scale, zero) - zero) * scale - weights).square_().sum(-1)

    def encode(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round to the nearest code, which is returned as a floating number."""
        return (torch.round(weights / scale) + zero).clamp(0, self.max_code)


def _round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round to float16; 1 where all weights are zero."""
    rounded = scale.half().to(scale.dtype)
    return torch.where(scale == 0, 1.0, rounded.clamp(min=SMALLEST_SCALE))
