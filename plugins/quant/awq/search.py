"""Which inputs to give a larger share of the codes: AWQ's search for scales and for clipping.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration,
arXiv:2306.00978.  Inputs are divided and weights multiplied by the same number, so that rounding hurts
the weights of strong inputs less; then each group gives up its largest weights if that makes the steps
of the others finer to an advantage.

Errors of outputs are computed from the second moments of the inputs: the mean square of e · x over the
text is eᵀ M e.  That is exact, and its cost does not grow with the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from plugins.quant.awq.rounding import round_to_nearest, split_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plugins.quant.awq.fold import Source

NUM_EXPONENTS: Final = 20
SHRINKAGES: Final = tuple(1 - step / 20 for step in range(11))
"""Shares of a group's largest weight to which weights are clipped."""
_TOKENS_AT_ONCE: Final = 4096
_MIN_SCALE: Final = 1e-4


class InputStats(NamedTuple):
    """What a search has to know of the inputs of a linear layer."""

    mean_abs: torch.Tensor
    """[in_features] float32."""
    moments: torch.Tensor
    """[in_features, in_features] float32: mean of x xᵀ."""

    def divided(self, scale: torch.Tensor) -> InputStats:
        """Those of the inputs divided by `scale`, [in_features]."""
        moments = self.moments / scale / scale.unsqueeze(-1)
        return InputStats(self.mean_abs / scale, moments)


def gather_stats(inputs: torch.Tensor) -> InputStats:
    """Measure inputs, [T, in_features] float32."""
    size, count = inputs.shape[1], max(1, len(inputs))
    mean_abs, moments = inputs.new_zeros(size), inputs.new_zeros(size, size)
    for part in inputs.split(_TOKENS_AT_ONCE):
        mean_abs += part.abs().sum(0) / count
        moments.addmm_(part.T, part, alpha=1 / count)
    return InputStats(mean_abs, moments)


# --- scales ----------------------------------------------------------------------------------------


def find_scale(
    weights: list[torch.Tensor], stats: InputStats, source: Source, group_size: int
) -> torch.Tensor:
    """Find what to divide the inputs of a layer by: the candidate under which rounding errs least.

    :param weights: of the shards, each [N, in_features] float32.
    :param source: says which divisors are possible.
    :return: [in_features] float32 above 0; ones if nothing is better.
    """
    best = torch.ones_like(stats.mean_abs)
    least = _rounding_error(weights, stats, best, group_size)
    for candidate in _candidates(weights, stats, group_size):
        scale = source.nearest(candidate)
        error = _rounding_error(weights, stats, scale, group_size)
        if error < least:
            best, least = scale, error
    return best


def _candidates(
    weights: list[torch.Tensor], stats: InputStats, group_size: int
) -> Iterator[torch.Tensor]:
    """Powers of the mean input, alone and over the rest of that power of the mean weight."""
    by_input = stats.mean_abs.clamp(min=_MIN_SCALE)
    by_weight = _mean_weight(weights, group_size).clamp(min=_MIN_SCALE)
    for step in range(NUM_EXPONENTS):
        exponent = step / NUM_EXPONENTS
        power = by_input.pow(exponent)
        yield _normalized(power)
        yield _normalized(power / by_weight.pow(1 - exponent))


def _normalized(scale: torch.Tensor) -> torch.Tensor:
    """Bring the geometric mean of the extremes to 1, so that norms and scales keep their magnitude."""
    scale = scale.clamp(min=_MIN_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def _mean_weight(weights: list[torch.Tensor], group_size: int) -> torch.Tensor:
    """Average the magnitude over all outputs, relative to the largest of each group: [in_features]."""
    total = torch.zeros_like(weights[0][0])
    for weight in weights:
        for _, rows in split_rows(weight):
            groups = rows.abs().unflatten(-1, (-1, group_size))
            largest = groups.amax(-1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)
            total += (groups / largest).flatten(-2).sum(0)
    return total / sum(len(weight) for weight in weights)


def _rounding_error(
    weights: list[torch.Tensor], stats: InputStats, scale: torch.Tensor, group_size: int
) -> float:
    """Sum, over the outputs, of the mean square error if weights are rounded under a scale."""
    error = torch.zeros((), device=scale.device)
    for weight in weights:
        for _, rows in split_rows(weight):
            groups = (rows * scale).unflatten(-1, (-1, group_size))
            off = (round_to_nearest(groups).dequantize() - groups).flatten(-2) / scale
            error += (off @ stats.moments).mul_(off).sum()
    return error.item()


# --- clipping --------------------------------------------------------------------------------------


def find_limits(weight: torch.Tensor, stats: InputStats, group_size: int) -> torch.Tensor:
    """Find the magnitude to which it is best to clip each group, by the error of its share of the output.

    :param weight: [N, in_features] float32.
    :return: [N, groups] float32.
    """
    blocks = _diagonal_blocks(stats.moments, group_size)
    limits = [
        _find_limits(part.unflatten(-1, (-1, group_size)), blocks) for _, part in split_rows(weight)
    ]
    return torch.cat(limits)


def _find_limits(groups: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    largest = groups.abs().amax(-1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in SHRINKAGES:
        limit = share * largest
        off = round_to_nearest(clip(groups, limit)).dequantize() - groups
        error = torch.einsum("ngi,gij->ngj", off, blocks).mul_(off).sum(-1)
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return best


def clip(groups: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Clip weights [N, groups, group size] to the magnitudes [N, groups]."""
    limits = limits.unsqueeze(-1)
    return groups.clamp(-limits, limits)


def _diagonal_blocks(moments: torch.Tensor, size: int) -> torch.Tensor:
    """View the moments within each group: [groups, size, size]."""
    by_group = moments.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    blocks: torch.Tensor = by_group.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return blocks
