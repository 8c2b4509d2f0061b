"""Counter-based random numbers: a draw is a pure function of (seed, position, token id).

No state advances, so batch composition, preemption, chunking and replay can not change a draw.  The
bits are those of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014): seed and position are hashed into the state of one stream, whose element number
`token id` belongs to that token.

Works on tensors, yet never imports torch, so that the host side can resolve seeds without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_MASK64: Final = 2**64 - 1
_GAMMA: Final = 0x9E3779B97F4A7C15
_ROUNDS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT: Final = 31
# 63 random bits become a uniform number in (0, 1).  Rounding to float32 can give 2^63, and this
# factor, the greatest float32 below 2^-63, keeps even that below 1.
_UNIT: Final = 2.0**-63 * (1.0 - 2.0**-24)


def splitmix64(state: int) -> int:
    """Return the number that a SplitMix64 generator in this state gives next, in [0, 2^64)."""
    value = (state + _GAMMA) & _MASK64
    for shift, factor in _ROUNDS:
        value = (value ^ (value >> shift)) * factor & _MASK64
    return value ^ (value >> _LAST_SHIFT)


def resolve_seed(engine_seed: int, index: int) -> int:
    """Derive an independent seed: of the index-th request without one, or the index-th of `n`.

    :return: in [0, 2^63), what `Request.seed` and `RowEntry.seed` hold.
    """
    return splitmix64(splitmix64(engine_seed & _MASK64) + index * _GAMMA) >> 1


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Hash every (row, token) to 64 bits.

    :param seeds: [N] int64.
    :param positions: [N] int64, of the token being drawn.
    :param token_ids: [V] int64.
    :return: [N, V] int64.
    """
    states = _mix_((_mix_(seeds + _signed(_GAMMA)) + positions * _signed(_GAMMA)) + _signed(_GAMMA))
    return _mix_(states[:, None] + (token_ids + 1) * _signed(_GAMMA))


def exponentials(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Draw numbers of the unit exponential distribution; parameters as for `random_bits`.

    Small ones, which decide races, keep float32's full relative precision: the least is 2^-63.

    :return: [N, V] float32 in [2^-63, 17).
    """
    bits = random_bits(seeds, positions, token_ids)
    bits &= 2**63 - 1
    bits |= 1  # never 0, so that it can divide
    return bits.float().mul_(-_UNIT).log1p_().neg_()


def _mix_(values: torch.Tensor) -> torch.Tensor:
    """Apply SplitMix64's finaliser in place; int64 wraps around as uint64 does."""
    for shift, factor in _ROUNDS:
        values ^= _shift_right(values, shift)
        values *= _signed(factor)
    values ^= _shift_right(values, _LAST_SHIFT)
    return values


def _shift_right(values: torch.Tensor, shift: int) -> torch.Tensor:
    # int64 shifts copies of the sign in from the left; a logical shift wants zeros.
    shifted = values >> shift
    shifted &= 2 ** (64 - shift) - 1
    return shifted


def _signed(value: int) -> int:
    """Reinterpret 64 unsigned bits as int64."""
    return value - 2**64 if value >= 2**63 else value
