"""Sequences for training, cut out of one long stream of token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def make_windows(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut inputs and targets, each int64 [starts, length], out of a stream of token ids."""
    window = tokens[starts[:, None] + torch.arange(length + 1, device=tokens.device)].long()
    return window[:, :-1], window[:, 1:]


def draw_starts(
    num_tokens: int, length: int, batch: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield int64 [batch] for ever: every pass cuts the stream at other places and shuffles the pieces."""
    num_pieces = (num_tokens - 1) // length - 1
    if num_pieces < batch:
        raise ValueError(
            f"{num_tokens} tokens make {max(num_pieces, 0)} windows of {length}, fewer than --batch {batch}"
        )
    while True:
        shift = torch.randint(length, (1,), generator=generator)
        starts = torch.randperm(num_pieces, generator=generator) * length + shift
        yield from starts[: num_pieces // batch * batch].view(-1, batch)
