"""The form in which a rank keeps a shard, whatever layout it was stored in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from core.quant.packing import WORD_BITS, codes_per_period
from core.sharding import Span, covering, local_groups


class Stored(NamedTuple):
    """One shard as all layouts agree to see it.  N: its output features, G: groups."""

    codes: torch.Tensor
    """[N, words] int32: codes packed along the inputs, see `WordSpan`."""
    scales: torch.Tensor
    """[N, G] floating."""
    zeros: torch.Tensor | None
    """[N, G] uint8; `None` if all are in the middle."""
    groups: torch.Tensor | None
    """[inputs] int64: the group of each input, if they have an order of their own."""


class WordSpan(NamedTuple):
    """The packed words that hold the codes of some inputs: whole periods of them."""

    words: Span
    """Of those of an output feature of the whole layer."""
    lead: int
    """Codes of other inputs before the first one."""


def word_span(inputs: Span, bits: int) -> WordSpan:
    """Find the words that hold the codes of a span of input features."""
    period = codes_per_period(bits)
    (periods,) = covering((inputs,), period)
    return WordSpan(periods.scaled(period * bits // WORD_BITS), inputs.start - periods.start * period)


def groups_in_order(inputs: Span, group_size: int | None, device: torch.device) -> torch.Tensor | None:
    """Tell the group of each input, counted among those that a rank has read.

    :return: [inputs] int64; `None` if all groups are whole, so that positions tell.
    """
    if group_size is None or not (inputs.start % group_size or inputs.stop % group_size):
        return None
    return torch.tensor(local_groups((inputs,), group_size), device=device)
