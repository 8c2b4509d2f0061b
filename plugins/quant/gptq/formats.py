"""How the weights of one layer are stored, whichever config said so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from core.interfaces import Axis
from core.sharding import Span, covering

WORD_BITS: Final = 32
SCALE_BITS: Final = 16
ZERO_BITS: Final = 8
"""Of a zero point in memory."""

Layout = Literal["gptq", "gptq_v2", "pack-quantized"]
"""`gptq` and `gptq_v2` differ in one thing: the former stores zero points less one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFormat:
    """What w = (code - zero point) · scale is made of: codes of 0 to 2 ** bits - 1."""

    layout: Layout
    bits: int
    group_size: int | None
    """Inputs that share scale and zero point; `None`: all inputs of an output feature do."""
    symmetric: bool
    """Whether every zero point is 2 ** (bits - 1)."""
    ordered: bool = False
    """Whether inputs belong to groups in an order of their own, which is stored (act-order)."""

    @property
    def middle(self) -> int:
        """The zero point that leaves room for equally many codes on both sides."""
        return 1 << (self.bits - 1)

    @property
    def group_axis(self) -> Axis | None:
        """What the dimension of groups runs along.

        With an order of their own, the inputs of a rank belong to groups anywhere.
        """
        if self.ordered or self.group_size is None:
            return None
        return Axis("in", self.group_size, shared=True)

    def num_groups(self, inputs: Span) -> int:
        """Count the groups that a span of input features touches."""
        if self.group_size is None:
            return 1
        (groups,) = covering((inputs,), self.group_size)
        return groups.size

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes in memory, with its share of scale and zero point."""
        if self.group_size is None:
            return self.bits
        return self.bits + (SCALE_BITS + (0 if self.symmetric else ZERO_BITS)) / self.group_size

    @property
    def cut_step(self) -> int:
        """Features by multiples of which a layer is best cut: whole words and whole groups."""
        period = WORD_BITS // math.gcd(self.bits, WORD_BITS)
        return period if self.ordered else math.lcm(period, self.group_size or 1)
