"""How a layer is stored in FP8: what each kind of checkpoint is read into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Strategy = Literal["channel", "tensor", "block"]
"""What shares a scale of the weight: an output feature, all of a shard, or 128 x 128."""
HEAD_ROLE: Final = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFormat:
    """How a layer is stored, and what becomes of its inputs."""

    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale of the weight.  `None`: each output feature has its own,
    or one is all that a shard has."""
    inputs: Literal["keep", "static", "dynamic"] = "keep"
    """Multiplied as they are, or rounded to FP8: with the stored scale, or with one of their own."""
    group_size: int | None = None
    """Inputs of a token that share a dynamic scale; `None`: all of them."""
    power_of_two: bool = False
    """Whether dynamic scales are powers of two."""
