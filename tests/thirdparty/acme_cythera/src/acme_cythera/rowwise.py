"""The attention backend: each row gathers its pages and attends densely, in float32 or better."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from core.batch import StepBatch
    from core.interfaces import AttentionSpec, KVCacheSpec


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a step."""

    tokens: slice
    """Its queries among the tokens of the step."""
    start: int
    """Position of the first query."""
    end: int
    """Positions that are known after the step."""
    pages: torch.Tensor
    """[ceil(end / block size)] int32."""


@dataclass(frozen=True, slots=True)
class StepMeta:
    """What all layers of a step share."""

    slots: torch.Tensor
    """[T] int64, where each token is stored."""
    rows: list[Row]


class RowwiseAttention:
    """Fulfils `core.interfaces.AttentionBackend`.

    The cache is [layers, num_blocks, block_size, 2, G, D]: all that one token stores lies together.
    It is left uninitialized, because a row reads no position that it has not written.
    """

    _spec: KVCacheSpec
    _cache: torch.Tensor

    def allocate_cache(self, spec: KVCacheSpec, /) -> None:
        """Allocate, or allocate anew, the pages of all layers."""
        self._spec = spec
        self._cache = torch.empty(0)  # the old one must be gone first
        token = (2, spec.num_kv_heads, spec.head_dim)
        self._cache = torch.empty(
            (spec.num_layers, spec.num_blocks, spec.block_size, *token),
            dtype=spec.dtype,
            device=spec.device,
        )

    def cache_bytes_per_block(self, spec: KVCacheSpec, /) -> int:
        """Bytes of one block over all layers; `spec.num_blocks` is ignored."""
        num_elements = spec.block_size * 2 * spec.num_kv_heads * spec.head_dim
        return spec.num_layers * num_elements * spec.dtype.itemsize

    def prepare(self, batch: StepBatch, /) -> StepMeta:
        """Find the queries and the pages of each row, from what the host knows."""
        bounds = itertools.pairwise(itertools.accumulate(batch.counts, initial=0))
        rows = []
        for start, bound, table in zip(batch.starts, bounds, batch.block_tables, strict=True):
            tokens = slice(*bound)
            end = start + tokens.stop - tokens.start
            num_pages = -(-end // self._spec.block_size)
            rows.append(Row(tokens, start, end, table[:num_pages]))
        return StepMeta(batch.slots, rows)

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
        meta: StepMeta,
        /,
    ) -> torch.Tensor:
        """Store k and v at the batch's slots, then attend row by row.

        :param q: [T, H, D] after rotary embedding.
        :param k: [T, G, D] after rotary embedding.
        :param v: [T, G, D].
        :return: [T, H, D] in q's dtype.
        """
        pages = self._cache[spec.layer]
        pages.flatten(0, 1)[meta.slots] = torch.stack((k, v), dim=1).to(pages.dtype)
        out = q.new_empty(q.shape)
        for row in meta.rows:
            stored = pages[row.pages].flatten(0, 1)[: row.end]
            out[row.tokens] = attend(q[row.tokens], stored, spec, row.start)
        return out


def attend(q: torch.Tensor, stored: torch.Tensor, spec: AttentionSpec, start: int) -> torch.Tensor:
    """Attend over one sequence.

    :param q: [C, H, D], queries at positions start, start + 1 …
    :param stored: [start + C, 2, G, D], keys and values at positions 0, 1 …
    :return: [C, H, D] in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(1, (spec.num_kv_heads, -1))  # [C, G, H / G, D]
    keys, values = stored.to(dtype).unbind(1)
    scores = spec.scale * torch.einsum("cghd,sgd->cghs", grouped, keys)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    hidden = ~visible(start, len(q), spec.window, q.device)[:, None, None]
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("cghs,sgd->cghd", weights, values).flatten(1, 2).to(q.dtype)


def visible(start: int, count: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Say which positions each of `count` queries sees: [count, start + count] bool."""
    queries = torch.arange(start, start + count, device=device)[:, None]
    keys = torch.arange(start + count, device=device)
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
