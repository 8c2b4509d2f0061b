"""Rotary position embedding: tables of cosine and sine, one row for each position.

A key is rotated once, when it enters the cache, and read by queries that come much later.  So the
rotation of a position must not depend on the length of a sequence, on its chunks or on who shares a
batch with it.  Two kinds of frequencies, however, are defined by the length of the sequence; here
the length is `max_len`, the longest sequence that the server accepts:

* `longrope` takes its long factors if and only if max_len > original_max_position;
* `dynamic` raises its base for max_len, if that is above original_max_position.

Both then equal `transformers` for a sequence of max_len tokens, and for every sequence if max_len is
at most original_max_position.  To serve short sequences exactly as the model was first trained,
lower the maximal length; vLLM chooses likewise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from core.model.spec import RopeSpec


class RotaryTable:
    """Cosine and sine of every position below `max_len`, ready to be looked up on the device.

    Computed in float32, as `transformers` does, or in float64 for a float64 model, then cast.

    :param dtype: of the model.
    """

    def __init__(self, spec: RopeSpec, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        frequencies = inverse_frequencies(spec, max_len, compute_dtype).to(device)
        positions = torch.arange(max_len, dtype=compute_dtype, device=device)
        angles = positions[:, None] * frequencies
        self.cos = (angles.cos() * spec.attention_factor).to(dtype)
        """[max_len, rotary_dim / 2]."""
        self.sin = (angles.sin() * spec.attention_factor).to(dtype)
        """[max_len, rotary_dim / 2]."""

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up the rows of positions.

        :param positions: [T] int64.
        :return: two of [T, 1, rotary_dim / 2], which broadcast over heads.
        """
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys; the two halves of the rotated dimensions form the pairs (NeoX style).

    :param q: [T, H, D].
    :param k: [T, G, D].
    :param cos: [T, 1, R / 2], in q's dtype; dimensions from R on pass through.
    :param sin: as `cos`.
    :return: both, contiguous, in their dtypes.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


# --- frequencies -----------------------------------------------------------------------------------


def inverse_frequencies(spec: RopeSpec, max_len: int, dtype: torch.dtype) -> torch.Tensor:
    """Radians per position of each pair of dimensions.

    :param max_len: longest sequence to serve; see above for what depends on it.
    :return: [rotary_dim / 2].
    """
    frequencies = 1.0 / _wavelengths(spec.theta, spec.rotary_dim, dtype)
    if spec.kind == "linear":
        return frequencies / spec.factor
    if spec.kind == "dynamic":
        return _dynamic(spec, max_len, dtype)
    if spec.kind == "llama3":
        return _llama3(spec, frequencies)
    if spec.kind == "yarn":
        return _yarn(spec, dtype)
    if spec.kind == "longrope":
        return _longrope(spec, max_len, dtype)
    return frequencies


def _wavelengths(theta: float, rotary_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Positions per radian."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim
    powers: torch.Tensor = theta**exponents
    return powers


def _dynamic(spec: RopeSpec, max_len: int, dtype: torch.dtype) -> torch.Tensor:
    """Raise the base, so that the slowest pair is stretched by the growth of the context (NTK-aware)."""
    stretch = spec.factor * max(max_len / spec.original_max_position, 1.0) - (spec.factor - 1)
    theta = spec.theta * stretch ** (spec.rotary_dim / (spec.rotary_dim - 2))
    return 1.0 / _wavelengths(theta, spec.rotary_dim, dtype)


def _llama3(spec: RopeSpec, frequencies: torch.Tensor) -> torch.Tensor:
    """Slow down the pairs that turn less than once within the original context; see Llama 3.1."""
    turns = spec.original_max_position * frequencies / (2 * math.pi)
    smooth = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / spec.factor + smooth * frequencies


def _yarn(spec: RopeSpec, dtype: torch.dtype) -> torch.Tensor:
    """Interpolate slow pairs, keep fast ones, and ramp between them; see arXiv:2309.00071."""
    wavelengths = _wavelengths(spec.theta, spec.rotary_dim, dtype)
    low, high = _yarn_pair(spec, spec.beta_fast), _yarn_pair(spec, spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    pairs = torch.arange(spec.rotary_dim // 2, dtype=dtype)
    ramp = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
    return ramp / (spec.factor * wavelengths) + (1 - ramp) / wavelengths


def _yarn_pair(spec: RopeSpec, num_turns: float) -> float:
    """Find the pair, as a fractional index, that turns so often within the original context."""
    wavelength = spec.original_max_position / (num_turns * 2 * math.pi)
    return spec.rotary_dim * math.log(wavelength) / (2 * math.log(spec.theta))


def _longrope(spec: RopeSpec, max_len: int, dtype: torch.dtype) -> torch.Tensor:
    """Slow down every pair by a factor of its own, searched for by the model's authors; arXiv:2402.13753."""
    is_long = max_len > spec.original_max_position
    factors = torch.tensor(spec.long_factor if is_long else spec.short_factor, dtype=dtype)
    return 1.0 / (factors * _wavelengths(spec.theta, spec.rotary_dim, dtype))
