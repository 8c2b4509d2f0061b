"""How a model is divided over ranks, as plain data without torch.

A *span* is a range of features, heads or layers of the whole model.  A *share* says which spans one
rank holds; a *cut* says the same of one linear layer.  Ranks may hold uneven parts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Span(NamedTuple):
    """start <= index < stop."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many indices."""
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        """Count in smaller units: a span of heads, as a span of their features."""
        return Span(self.start * factor, self.stop * factor)

    def shifted(self, offset: int) -> Span:
        """Move."""
        return Span(self.start + offset, self.stop + offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank holds, in units of the whole model."""

    layers: Span
    heads: Span
    """Query heads.  They use the key-value heads `kv_heads`, each of these equally many of them."""
    kv_heads: Span
    """Several ranks may hold the same one."""
    inner: Span
    """Features between the two halves of the MLP."""
    vocab: Span
    """Rows of the embedding and of the output projection."""
    tensor_rank: int = 0
    """Within the ranks that share the layers of one stage; the first of them adds the biases."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a linear layer that one rank holds, in features of the whole layer."""

    inputs: Span
    outputs: tuple[tuple[Span, ...], ...]
    """Of each shard.  A shard that the checkpoint stores fused contributes several spans."""


def divide(count: int, num_parts: int, step: int = 1) -> tuple[Span, ...]:
    """Divide `count` things into consecutive parts as even as possible, larger ones first.

    :param step: parts begin at multiples of it if there are enough multiples for every part to get
        something, else at multiples of 1.
    """
    if count % step or count // step < num_parts:
        step = 1
    base, rest = divmod(count // step, num_parts)
    bounds = [(index * base + min(index, rest)) * step for index in range(num_parts + 1)]
    return tuple(Span(*pair) for pair in itertools.pairwise(bounds))


def covering(spans: Sequence[Span], step: int) -> Iterator[Span]:
    """For each span of features, the indices that touch it where one index stands for `step` features."""
    for span in spans:
        yield Span(span.start // step, -(-span.stop // step))


def local_groups(spans: Sequence[Span], step: int) -> list[int]:
    """For each feature that a rank holds, the position of its group among those that the rank read.

    A group is `step` consecutive features of the whole layer, such as those that share a scale.  A
    rank reads the groups that each of its spans touches, in order.

    :return: as many numbers as the spans have features.
    """
    positions: list[int] = []
    num_read = 0
    for span, groups in zip(spans, covering(spans, step), strict=True):
        positions += [num_read + f // step - groups.start for f in range(span.start, span.stop)]
        num_read += groups.size
    return positions
