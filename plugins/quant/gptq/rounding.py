"""GPTQ: weights in groups that share a scale, rounded so that later inputs make up for earlier errors.

How errors are passed on is in `core.quant.feedback`; here is what is chosen and stored on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from core.errors import CheckpointError
from core.quant.feedback import find_order, invert, round_inputs

if TYPE_CHECKING:
    from plugins.quant.gptq.grid import Grid


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix of N output features after rounding."""

    codes: torch.Tensor
    """[N, inputs] uint8."""
    scales: torch.Tensor
    """[N, groups], float16 numbers in the dtype of the weights."""
    zeros: torch.Tensor
    """[N, groups] uint8, 1 to 2 ** bits - 1."""
    groups: torch.Tensor
    """[inputs] int32: the group of each input."""

    def dequantize(self) -> torch.Tensor:
        """Compute what the codes stand for: [N, inputs] in the dtype of the scales."""
        groups = self.groups.long()
        offsets = self.codes.to(self.scales.dtype) - self.zeros.to(self.scales.dtype)[:, groups]
        return offsets * self.scales[:, groups]


def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    group_size: int | None,
    *,
    damp_percent: float,
    act_order: bool = False,
    name: str = "",
) -> Quantized:
    """Quantize a matrix so that its product with the inputs behind a Hessian changes little.

    :param weight: [N, inputs] floating; left as it is.
    :param group_size: inputs that share scale and zero point, `None` for all; divides the inputs.
    :param act_order: round the inputs in the order of `find_order`, and group them so.
    :param name: of the layer, for messages.
    :raises CheckpointError: a weight is not finite or beyond float16 scales, or as `invert` does.
    """
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = find_order(hessian)
        hessian = hessian[order][:, order]
    upper = invert(hessian, damp_percent, name).to(weight.dtype)
    group_size = group_size or weight.shape[1]
    rest = weight[:, order]
    rounding = _Rounding(rest, grid, group_size)
    round_inputs(rest, upper, rounding.round_input, group_size)
    if not rounding.scales.isfinite().all():
        raise CheckpointError(f"{name} holds a weight that is not finite, or too large for its scale")
    places = torch.argsort(order)
    groups = (places // group_size).to(torch.int32)
    scales, zeros = rounding.scales.T.contiguous(), rounding.zeros.T.to(torch.uint8)
    return Quantized(rounding.codes[places].T.contiguous(), scales, zeros, groups)


class _Rounding:
    """What the inputs of a matrix are rounded to, and what is stored of them.

    :param rest: [N, inputs]: what is to be rounded, as `round_inputs` changes it.
    """

    def __init__(self, rest: torch.Tensor, grid: Grid, group_size: int) -> None:
        num_outputs, num_inputs = rest.shape
        self._rest = rest
        self._grid = grid
        self._group_size = group_size
        self.codes = torch.empty((num_inputs, num_outputs), dtype=torch.uint8, device=rest.device)
        self.scales = rest.new_empty((num_inputs // group_size, num_outputs))
        self.zeros = torch.empty_like(self.scales)

    def round_input(self, index: int, later: torch.Tensor) -> torch.Tensor:
        """Round the weights of an input: a `RoundInput`."""
        group, offset = divmod(index, self._group_size)
        if offset == 0:
            self._fit(group, later)
        scale, zero = self.scales[group], self.zeros[group]
        codes = self._grid.encode(later[0], scale, zero)
        self.codes[index] = codes.to(torch.uint8)
        return (codes - zero) * scale

    def _fit(self, group: int, later: torch.Tensor) -> None:
        """Choose scale and zero point of a group that begins.

        :param later: [inputs, N]: what is to be rounded next of the block, all of the group or less.
        """
        if len(later) < self._group_size:
            # It goes on in later blocks, which the errors so far have reached.
            start = group * self._group_size
            later = self._rest[:, start : start + self._group_size].T
        self.scales[group], self.zeros[group] = self._grid.fit(later[: self._group_size].T)
