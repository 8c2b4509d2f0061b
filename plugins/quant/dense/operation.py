"""What a linear layer is asked to compute, and how a kernel is to do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kernel = Literal["vector", "tile", "library", "fused", "whole", "shared"]
Overlap = Literal["", "early", "late"]

FUSED_GATES: Final = ("fused", "whole", "shared")
"""Kernels for gates of many tokens: `whole` and `shared` are `gate_hopper` with tiles of one program or of several,
and `fused` is whichever of the two and the library should be fastest."""
FOR_ANY_TOKENS: Final = ("library", *FUSED_GATES)
"""Kernels that serve any number of tokens."""
TOKENS_OF_VECTOR: Final = (1, 2, 4)
"""Numbers of tokens that the kernel without tensor cores exists for; others take the next."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What a linear layer is to compute, but for the number of tokens."""

    num_outputs: int
    """Of the result: with a gate, half the rows of the weight."""
    num_inputs: int
    norm: str = ""
    """Style of the norm before it; empty: none."""
    activation: str = ""
    """Between the halves of a gated layer; empty: no gate."""
    residual: bool = False
    bias: bool = False

    @property
    def num_rows(self) -> int:
        """Of the weight."""
        return self.num_outputs * (2 if self.activation else 1)

    @property
    def kind(self) -> str:
        """What tells it from others of its shape, as tables call it."""
        if self.activation:
            return "gate"
        return "norm" if self.norm else "residual" if self.residual else "plain"


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """How an operation is computed; of `FOR_ANY_TOKENS`, only `overlap` counts."""

    kernel: Kernel
    block_n: int = 0
    block_k: int = 0
    block_m: int = 1
    """Tokens of a tile; of `vector`: accumulators."""
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 1
    swap: bool = False
    """Whether the weight takes the rows of the tensor cores and the tokens the columns."""
    eager: bool = False
    """Whether weights go through registers, the first of them before the previous kernel has ended."""
    tma: bool = False
    """Whether weights are fetched by the copy engine of compute capability 9."""
    prefetch: int = 0
    """Columns of the weight to bring to L2 before the previous kernel has ended; needs 9.0 too."""
    fuse_norm: bool = True
    """Whether the kernel normalizes its input, or leaves it to a kernel before it."""
    overlap: Overlap = "early"
    """When the next kernel may start, and whether this one starts before the previous has ended."""


def partial_sizes(op: Operation, config: KernelConfig, num_tokens: int) -> tuple[int, int]:
    """Count the float32 partial sums and the tiles that a split sum needs room for.

    :return: both 0 if the sum is not split.
    """
    if config.split_k == 1:
        return 0, 0
    tiles = -(-num_tokens // config.block_m) * -(-op.num_outputs // config.block_n)
    halves = 2 if op.activation else 1
    part = halves * config.block_m * config.block_n + config.block_m
    return tiles * config.split_k * part, tiles
