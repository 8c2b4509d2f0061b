"""Blocks of a matrix whose elements share a scale; those at the end may be smaller than the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.nn import functional

from core.errors import CheckpointError
from plugins.quant.fp8.rounding import encode, scale_of

if TYPE_CHECKING:
    from plugins.quant.fp8.formats import Strategy

ROWS_AT_ONCE: Final = 4096
"""Rows of a matrix that are converted at a time, which bounds the float32 copies."""
BLOCK_SIZE: Final = 128


class Block(NamedTuple):
    """How large a block is."""

    rows: int
    columns: int


def block_of(strategy: Strategy, shape: torch.Size) -> Block:
    """Say what shares a scale in a matrix [outputs, inputs]."""
    if strategy == "block":
        return Block(BLOCK_SIZE, BLOCK_SIZE)
    return Block(1 if strategy == "channel" else shape[0], shape[1])


def in_groups(x: torch.Tensor, size: int, lead: int = 0) -> torch.Tensor:
    """Cut the last dimension into groups.

    :param x: [..., N].
    :param lead: elements of the first group that come before x.
    :return: [..., groups, size], padded with zeros.
    """
    num_groups = -(-(lead + x.shape[-1]) // size)
    rest = num_groups * size - lead - x.shape[-1]
    groups: torch.Tensor = functional.pad(x, (lead, rest)).unflatten(-1, (num_groups, size))
    return groups


def spread(scale: torch.Tensor, size: int, lead: int, count: int) -> torch.Tensor:
    """Repeat the scale of each group for its elements.

    :param scale: [..., groups].
    :param lead: as for `in_groups`.
    :return: [..., count].
    """
    return scale.repeat_interleave(size, -1)[..., lead : lead + count]


def block_scales(weight: torch.Tensor, block: Block, name: str) -> torch.Tensor:
    """Choose a scale for each block of a matrix.

    :param weight: [R, C] floating.
    :param name: of the layer, for the message.
    :return: [ceil(R / rows), ceil(C / columns)] float32.
    :raises CheckpointError: a weight is NaN or infinite.
    """
    by_row = torch.cat(
        [in_groups(part.abs(), block.columns).amax(-1) for part in weight.split(ROWS_AT_ONCE)]
    )
    scales = scale_of(in_groups(by_row.T, block.rows).amax(-1).T).contiguous()
    if not scales.isfinite().all():
        raise CheckpointError(
            f"{name}.weight holds a number that is infinite, NaN or too large for float32, and FP8 has "
            f"no code for it"
        )
    return scales


def quantize(weight: torch.Tensor, block: Block, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix.

    :param weight: [R, C] floating.
    :param name: of the layer, for the message.
    :return: codes [R, C] float8_e4m3fn, and scales as `block_scales` returns them.
    :raises CheckpointError: a weight is NaN or infinite.
    """
    scales = block_scales(weight, block, name)
    codes = [
        encode(part, spread(scales[rows // block.rows], block.columns, 0, weight.shape[1]))
        for part, rows in zip(
            weight.split(ROWS_AT_ONCE),
            torch.arange(len(weight), device=weight.device).split(ROWS_AT_ONCE),
            strict=True,
        )
    ]
    return torch.cat(codes), scales
