"""GPTQ: rounding weights one input at a time, so that later inputs make up for the errors of earlier.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
arXiv:2210.17323.  For inputs X, [T, inputs], a change D of the weights changes the outputs by
sum d (XᵀX) dᵀ over the rows d of D: a quadratic form with the Hessian H = 2 XᵀX.  Once an input has
been rounded, the best change of the remaining ones is known; all steps together are a Cholesky
decomposition of the inverse of H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from core.errors import CheckpointError
from plugins.quant.gptq.hessian import find_order, invert

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plugins.quant.gptq.grid import Grid

BLOCK_SIZE: Final = 128
"""Inputs after which the errors of a block reach all later inputs, in one product."""


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
    rounding = _Rounding(weight[:, order], upper, grid, group_size or weight.shape[1])
    rounding.run()
    if not rounding.scales.isfinite().all():
        raise CheckpointError(f"{name} holds a weight that is not finite, or too large for its scale")
    places = torch.argsort(order)
    groups = (places // rounding.group_size).to(torch.int32)
    scales, zeros = rounding.scales.T.contiguous(), rounding.zeros.T.to(torch.uint8)
    return Quantized(rounding.codes[:, places], scales, zeros, groups)


class _Rounding:
    """Rounds the inputs of a matrix in order.

    :param rest: [N, inputs]; changes: what is left of it is to be rounded.
    :param upper: see `invert`.
    """

    def __init__(self, rest: torch.Tensor, upper: torch.Tensor, grid: Grid, group_size: int) -> None:
        num_outputs, num_inputs = rest.shape
        self.rest = rest
        self.upper = upper
        self.grid = grid
        self.group_size = group_size
        self.codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
        self.scales = rest.new_empty((num_inputs // group_size, num_outputs))
        self.zeros = torch.empty_like(self.scales)

    def run(self) -> None:
        """Round all."""
        for block in _blocks(self.rest.shape[1], self.group_size):
            errors = self._round_block(block)
            self.rest[:, block.stop :] -= errors.T @ self.upper[block, block.stop :]

    def _round_block(self, block: slice) -> torch.Tensor:
        """Round a block of inputs one by one.

        :return: [block, N]: errors in units of U's diagonal, by which later inputs are to change.
        """
        rest = self.rest[:, block].T.contiguous()  # inputs first: each is read and changed at once
        upper = self.upper[block, block]
        errors, codes = torch.empty_like(rest), torch.empty_like(rest)
        for index, weights in enumerate(rest):
            group, offset = divmod(block.start + index, self.group_size)
            if offset == 0:
                self._fit(group, rest[index:])
            scale, zero = self.scales[group], self.zeros[group]
            codes[index] = self.grid.encode(weights, scale, zero)
            errors[index] = (weights - (codes[index] - zero) * scale) / upper[index, index]
            rest[index + 1 :].addr_(upper[index, index + 1 :], errors[index], alpha=-1)
        self.codes[:, block] = codes.T.to(torch.uint8)
        return errors

    def _fit(self, group: int, later: torch.Tensor) -> None:
        """Choose scale and zero point of a group that begins.

        :param later: [inputs, N]: what is to be rounded next of the block, all of the group or less.
        """
        if (
            len(later) < self.group_size
        ):  # it goes on in later blocks, which the errors so far have reached
            start = group * self.group_size
            later = self.rest[:, start : start + self.group_size].T
        self.scales[group], self.zeros[group] = self.grid.fit(later[: self.group_size].T)


def _blocks(num_inputs: int, group_size: int) -> Iterator[slice]:
    """Cut inputs into blocks: whole groups, or whole parts of one.

    Then all weights of a group have their final values when its scale is chosen.
    """
    step = BLOCK_SIZE
    if group_size <= BLOCK_SIZE:
        step = BLOCK_SIZE // group_size * group_size
    elif group_size < num_inputs:
        step = next(size for size in range(BLOCK_SIZE, 0, -1) if group_size % size == 0)
    for start in range(0, num_inputs, step):
        yield slice(start, min(start + step, num_inputs))
