"""Attention over whole sequences of one length, without a cache: what calibration runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from core.batch import StepBatch
    from core.interfaces import AttentionSpec, KVCacheSpec


class DenseAttention:
    """Fulfils `core.interfaces.AttentionBackend` for sequences that begin and end within a step.

    What `prepare` returns elsewhere is here the length of each sequence, in tokens.
    """

    observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    """Called with the keys and values of each forward, as a cache would get them: [N · L, G, D]."""

    def allocate_cache(self, _spec: KVCacheSpec, /) -> None:
        """Do nothing: nobody reads keys later."""

    def cache_bytes_per_block(self, _spec: KVCacheSpec, /) -> int:
        """Return 0."""
        return 0

    def prepare(self, batch: StepBatch, /) -> int:
        """Return the length of the sequences, which all have the same."""
        return batch.counts[0]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        meta: Any,
        /,
    ) -> torch.Tensor:
        """Attend within each sequence.

        :param q: [N · L, H, D].
        :param k: [N · L, G, D].
        :param v: [N · L, G, D].
        :param meta: L.
        :return: [N · L, H, D].
        """
        if self.observe is not None:
            self.observe(k, v)
        q, k, v = (x.unflatten(0, (-1, meta)).transpose(1, 2) for x in (q, k, v))
        attended = self._attend(q, k, v, spec)
        return attended.transpose(1, 2).flatten(0, 1)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        if spec.softcap is not None:
            return _attend_capped(q, k, v, spec, spec.softcap)
        is_causal = spec.window is None
        mask = None if is_causal else _mask(q.shape[2], spec, q.device)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=spec.scale, enable_gqa=True
        )


def _attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, cap: float
) -> torch.Tensor:
    """Attend where scores are bounded: torch has no fused form of that."""
    per_group = spec.num_heads // spec.num_kv_heads
    k, v = (x.repeat_interleave(per_group, dim=1) for x in (k, v))
    scores = cap * torch.tanh(spec.scale / cap * (q @ k.transpose(-1, -2)))
    hidden = ~_mask(q.shape[2], spec, q.device)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ v


def _mask(length: int, spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """Say which keys each query sees: [L, L] bool."""
    ages = torch.arange(length, device=device)
    ages = ages[:, None] - ages  # how many tokens ago the key was
    return (ages >= 0) if spec.window is None else (ages >= 0) & (ages < spec.window)
