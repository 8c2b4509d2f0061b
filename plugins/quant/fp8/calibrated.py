"""FP8 weights that change little of what a layer makes of the calibration text.

Scales are chosen first, then inputs are rounded one by one: see `core.quant.feedback`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from core.quant.feedback import find_order, invert, round_inputs
from plugins.quant.fp8.blocks import ROWS_AT_ONCE, block_of, block_scales, in_groups, spread
from plugins.quant.fp8.rounding import DTYPE, decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plugins.quant.fp8.blocks import Block
    from plugins.quant.fp8.formats import Strategy

FACTORS: Final = tuple(2 ** (step / 8) for step in range(8))
"""Of the scale that brings the largest magnitude to 448, those that are tried.

From one power of two to the next all that codes can do comes again.  Smaller scales cut off the
largest magnitudes, which errors of a float format, relative as they are, do not repay.
"""


def quantize(
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    strategy: Strategy,
    *,
    damp_percent: float,
    name: str,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Quantize the shards of a layer so that their products with the inputs behind a Hessian change little.

    Inputs whose errors cost most are rounded first: nothing stored depends on the order.

    :param weights: by prefix, [N, inputs] float32 each; left as they are.
    :param hessian: see `core.quant.feedback.find_hessian`.
    :param strategy: what shares a scale; shards never do.
    :param damp_percent: see `core.quant.feedback.invert`.
    :param name: of the layer, for messages.
    :return: by prefix codes, [N, inputs] float8_e4m3fn, and scales as `block_scales` returns them.
    :raises CheckpointError: a weight is NaN or infinite, or as `invert` does.
    """
    order = find_order(hessian)
    upper = invert(hessian[order][:, order], damp_percent, name)
    costs = torch.empty_like(hessian[0])
    costs[order] = upper.diagonal().square().reciprocal()
    scales, per_row = {}, []
    for prefix, weight in weights.items():
        block = block_of(strategy, weight.shape)
        scales[prefix] = find_scales(weight, block, costs, prefix)
        per_row.append(scales[prefix].repeat_interleave(block.rows, 0)[: len(weight)])
    rest = torch.cat(list(weights.values()))
    codes = _round(rest, upper, torch.cat(per_row), block.columns, order)
    parts = codes.split([len(weight) for weight in weights.values()])
    return {
        prefix: (part.clone(), scales[prefix])  # files hold no storage twice
        for prefix, part in zip(weights, parts, strict=True)
    }


def find_scales(weight: torch.Tensor, block: Block, costs: torch.Tensor, name: str) -> torch.Tensor:
    """Choose for each block the scale of `FACTORS` that rounds to nearest with the least squares.

    :param weight: [R, C] floating.
    :param costs: [C]: what a squared error costs, by input.
    :param name: of the layer, for the message.
    :return: as `block_scales` returns them.
    :raises CheckpointError: a weight is NaN or infinite.
    """
    widest = block_scales(weight, block, name)
    scales, least = widest, _squares(weight, block, costs, widest)
    for factor in FACTORS[1:]:
        candidate = widest * factor
        squares = _squares(weight, block, costs, candidate)
        is_better = squares < least
        scales, least = (
            torch.where(is_better, new, old) for new, old in ((candidate, scales), (squares, least))
        )
    return scales


def _squares(
    weight: torch.Tensor, block: Block, costs: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Sum squared errors of rounding to nearest over each block, times their costs."""
    rows = torch.arange(len(weight), device=weight.device)
    by_row = []
    for part, indices in zip(weight.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE), strict=True):
        scale = spread(scales[indices // block.rows], block.columns, 0, weight.shape[1])
        squares = (decode(encode(part, scale), scale) - part).square_().mul_(costs)
        by_row.append(in_groups(squares, block.columns).sum(-1))
    return in_groups(torch.cat(by_row).T, block.rows).sum(-1).T


def _round(
    weight: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor, columns: int, order: torch.Tensor
) -> torch.Tensor:
    """Round inputs in an order, under scales that are given.

    :param weight: [N, inputs] float32, with inputs where they belong.
    :param upper: see `core.quant.feedback.invert`, in that order.
    :param scales: [N, groups] float32, of groups of so many columns.
    :return: [N, inputs] float8_e4m3fn, with inputs where they belong.
    """
    codes = torch.empty(weight.T.shape, dtype=DTYPE, device=weight.device)
    by_group, places = scales.T.contiguous(), order.tolist()

    def round_input(index: int, later: torch.Tensor) -> torch.Tensor:
        place = places[index]
        scale = by_group[place // columns]
        codes[place] = encode(later[0], scale)
        return decode(codes[place], scale)

    round_inputs(weight[:, order], upper, round_input)
    return codes.T.contiguous()
