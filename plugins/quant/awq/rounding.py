"""Codes of four bits under a scale and a zero point for each group of inputs, by rounding to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from plugins.quant.awq.config import BITS, CODES_PER_WORD

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MAX_CODE: Final = (1 << BITS) - 1
_MIN_SCALE: Final = 2.0**-24  # the smallest of float16: a scale of 0 would lose the whole group
_ELEMENTS_AT_ONCE: Final = 1 << 22


class Rounded(NamedTuple):
    """A weight as it is stored: (code - zero point) · scale."""

    codes: torch.Tensor
    """[N, groups, group size] float32, whole numbers from 0 to 15."""
    zeros: torch.Tensor
    """[N, groups, 1] float32, whole numbers from 0 to 15."""
    scales: torch.Tensor
    """[N, groups, 1] float16."""

    def dequantize(self) -> torch.Tensor:
        """Compute the weights: [N, groups, group size] float32."""
        return (self.codes - self.zeros) * self.scales.float()


def round_to_nearest(groups: torch.Tensor) -> Rounded:
    """Round weights under scales that leave none of them out of range.

    The range of a group includes 0, so that its zero point is a code.  Codes are chosen for the scale
    as it is stored, in float16.

    :param groups: [N, groups, group size] float32.
    """
    low, high = groups.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / MAX_CODE).half().clamp(min=_MIN_SCALE)
    wide = scales.float()
    zeros = (-low / wide).round_().clamp_(0, MAX_CODE)
    codes = (groups / wide).round_().add_(zeros).clamp_(0, MAX_CODE)
    return Rounded(codes, zeros, scales)


def split_rows(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cut a weight [N, in_features] into as many rows as are worked on at a time: whole words.

    :return: which rows, and these.
    """
    count = max(1, _ELEMENTS_AT_ONCE // weight.shape[1] // CODES_PER_WORD) * CODES_PER_WORD
    for start in range(0, len(weight), count):
        rows = slice(start, min(start + count, len(weight)))
        yield rows, weight[rows]
