"""Paged attention over `torch.nn.functional.scaled_dot_product_attention`.

A step is cut into *tiles*: either one query of each of several rows of similar length (decodes), or
some consecutive queries of one row (a piece of a prompt).  For each tile the keys and values of its
rows are copied next to one another and attended densely under a mask.  Tiles are small enough for
the copy to stay in the processor's cache, and rows that share one are so alike that little is
padding.  Padding repeats the last position of its row: what no row has written may be NaN, which
not even a weight of zero would cancel, so it is never read.

Where the cache is narrower than the model, every query sees the numbers that are stored, those of
its own step too: how a prompt is cut into steps must not show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from plugins.attention.torch.narrowing import narrow, rescale, storage_dtype, widen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from numpy.typing import NDArray

    from core.batch import StepBatch
    from core.interfaces import AttentionSpec, KVCacheSpec

NO_WINDOW: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class TileLimits:
    """How large a tile may become."""

    num_elements: int
    """Of the copied keys, and as many of values; a single row may need more."""
    num_queries: int
    """Of one row; bounds the mask and, under a softcap, the scores."""


CPU_LIMITS: Final = TileLimits(num_elements=1 << 19, num_queries=128)
DEVICE_LIMITS: Final = TileLimits(num_elements=1 << 22, num_queries=1024)


@dataclass(frozen=True, slots=True)
class Tile:
    """N rows with C queries each, over M positions; N or C is 1."""

    tokens: torch.Tensor | slice
    """The N · C tokens of the step that are its queries."""
    keys: torch.Tensor | slice
    """[N · G · M] int64, places in the cache: (block · G + head) · block_size + offset, row by row
    and head by head; or, for the start of a prompt, tokens of this very step."""
    mask: torch.Tensor
    """[N, C, M] bool: what each query sees."""


@dataclass(slots=True)
class StepMeta:
    """What all layers of a step share."""

    batch: StepBatch
    blocks: torch.Tensor
    """[T] int64, where each token is stored."""
    offsets: torch.Tensor
    """[T] int64, its position within that block."""
    tiles: dict[int | None, list[Tile]] = field(default_factory=dict)
    """By window, cut when the first layer with that window is reached."""


class TorchAttention:
    """The reference among the attention backends; fulfils `core.interfaces.AttentionBackend`.

    Keeps quantized keys and values too: `core.interfaces.SupportsQuantizedKV`.  Their scales are never
    multiplied with what is read: those of the keys go into the queries, those of the values into the
    output, which is the same sum with one multiplication for each query instead of each key.

    The cache is [layers, 2, num_blocks, G, block_size, D]: what one head has in one block lies
    together.  It is left uninitialised, since nothing is read that has not been written.

    :param limits: of the tiles; by default what suits the cache's device.
    """

    _spec: KVCacheSpec
    _limits: TileLimits
    _cache: torch.Tensor
    _scales: torch.Tensor | None
    """[layers, 2, G] float32, of keys and of values; `None` for ones."""
    _scratch: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, limits: TileLimits | None = None) -> None:
        self._wanted_limits = limits

    def allocate_cache(self, spec: KVCacheSpec, /) -> None:
        """Allocate, or allocate anew, the pages of all layers."""
        self._cache = torch.empty(0)  # the old one must be gone first
        self._spec = spec
        default = CPU_LIMITS if spec.device.type == "cpu" else DEVICE_LIMITS
        self._limits = self._wanted_limits or default
        page = (spec.num_kv_heads, spec.block_size, spec.head_dim)
        self._cache = torch.empty(
            (spec.num_layers, 2, spec.num_blocks, *page),
            dtype=storage_dtype(spec.dtype),
            device=spec.device,
        )
        self._scales = None
        self._scratch = {}
        self._scratch_like((self._limits.num_elements,), self._cache.dtype)  # part of what it takes

    def set_kv_scales(self, k_scales: torch.Tensor, v_scales: torch.Tensor, /) -> None:
        """Take the factors by which stored values are multiplied when they are read.

        :param k_scales: [layers, G] float32.
        :param v_scales: [layers, G] float32.
        """
        self._scales = torch.stack((k_scales, v_scales), dim=1).to(self._spec.device)

    def cache_bytes_per_block(self, spec: KVCacheSpec, /) -> int:
        """Bytes of one block over all layers; `spec.num_blocks` is ignored."""
        num_elements = spec.num_kv_heads * spec.block_size * spec.head_dim
        return spec.num_layers * 2 * num_elements * spec.dtype.itemsize

    def prepare(self, batch: StepBatch, /) -> StepMeta:
        """Find the place of each token; called once a step."""
        block_size = self._spec.block_size
        return StepMeta(batch, batch.slots // block_size, batch.slots % block_size)

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
        """Store k and v at the batch's slots, then attend tile by tile.

        :param q: [T, H, D] after rotary embedding.
        :param k: [T, G, D] after rotary embedding.
        :param v: [T, G, D].
        :return: [T, H, D] in q's dtype.
        """
        cache = self._cache[spec.layer]
        k_scales, v_scales = (None, None) if self._scales is None else self._scales[spec.layer]
        stored = (narrow(k, self._spec.dtype, k_scales), narrow(v, self._spec.dtype, v_scales))
        for pages, tokens in zip(cache, stored, strict=True):
            pages.transpose(1, 2)[meta.blocks, meta.offsets] = tokens.view(cache.dtype)
        fresh = tuple(
            x if x.dtype == q.dtype else widen(x, torch.empty_like(x, dtype=q.dtype)) for x in stored
        )
        if spec.window not in meta.tiles:
            cutter = TileCutter(meta.batch, self._spec, spec.window or NO_WINDOW, self._limits)
            meta.tiles[spec.window] = list(cutter.cut())
        q = rescale(q, k_scales)
        out = q.new_empty(q.shape)
        for tile in meta.tiles[spec.window]:
            keys, values = self._side_by_side(cache, tile, fresh)
            out[tile.tokens] = attend(q[tile.tokens], keys, values, tile.mask, spec)
        return rescale(out, v_scales)

    def _side_by_side(
        self, cache: torch.Tensor, tile: Tile, fresh: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Bring a tile's keys and values into the form [N, G, M, D].

        :param fresh: those of this step, [T, G, D] in the dtype to attend in.
        """
        if isinstance(tile.keys, slice):
            return tuple(tokens[tile.keys].transpose(0, 1).unsqueeze(0) for tokens in fresh)
        num_rows, _, num_keys = tile.mask.shape
        shape = (num_rows, cache.shape[2], num_keys, cache.shape[4])
        copies = self._scratch_like(shape, cache.dtype)
        for pages, copy in zip(cache, copies, strict=True):
            torch.index_select(pages.flatten(0, 2), 0, tile.keys, out=copy.view(-1, shape[3]))
        dtype = fresh[0].dtype
        if dtype == self._spec.dtype:
            return copies
        wide = self._scratch_like(shape, dtype)
        return tuple(widen(x.view(self._spec.dtype), y) for x, y in zip(copies, wide, strict=True))

    def _scratch_like(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Lend memory for one tile's keys and values.

        New memory for each copy would cost more in page faults than the copying itself.
        """
        size = int(np.prod(shape))
        if dtype not in self._scratch or size > len(self._scratch[dtype][0]):
            length = max(size, self._limits.num_elements)
            # Two allocations, as kernels on GPUs want both to begin at a multiple of 16 bytes.
            first, second = (self._cache.new_empty(length, dtype=dtype) for _ in range(2))
            self._scratch[dtype] = first, second
        return tuple(memory[:size].view(shape) for memory in self._scratch[dtype])


# --- cutting a step into tiles ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TileCutter:
    """Cuts a step into tiles, for the layers with one window.

    Lengths come from the host's lists; only the block tables are read on the device, so that
    nothing here waits for it.
    """

    batch: StepBatch
    cache: KVCacheSpec
    window: int
    limits: TileLimits

    def cut(self) -> Iterator[Tile]:
        """Cover every token of the step once."""
        first_tokens = np.cumsum([0, *self.batch.counts])
        singles = [row for row, count in enumerate(self.batch.counts) if count == 1]
        for rows in self._similar(singles):
            tokens = self._to_device(first_tokens[rows])
            yield self._cached(rows, tokens, np.take(self.batch.starts, rows), 1)
        for row, count in enumerate(self.batch.counts):
            if count > 1:
                yield from self._prompt(row, int(first_tokens[row]), count)

    def _similar(self, rows: list[int]) -> Iterator[list[int]]:
        """Group rows with one query each, the shortest first, as far as their copies stay small."""
        num_keys = {row: min(self.batch.starts[row] + 1, self.window) for row in rows}
        key_size = self.cache.num_kv_heads * self.cache.head_dim
        group: list[int] = []
        for row in sorted(rows, key=num_keys.__getitem__):
            if group and (len(group) + 1) * num_keys[row] * key_size > self.limits.num_elements:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _prompt(self, row: int, first_token: int, count: int) -> Iterator[Tile]:
        """Cut the queries of one row into runs."""
        for done in range(0, count, self.limits.num_queries):
            num_queries = min(self.limits.num_queries, count - done)
            tokens = slice(first_token + done, first_token + done + num_queries)
            start = self.batch.starts[row] + done
            if start == done:
                yield self._fresh(tokens, first_token, start, num_queries)
            else:
                yield self._cached([row], tokens, np.array([start]), num_queries)

    def _fresh(self, tokens: slice, first_token: int, start: int, num_queries: int) -> Tile:
        """Describe queries of a prompt that began in this step: its keys need no copy."""
        first, end = max(0, start - self.window + 1), start + num_queries
        mask = self._mask(np.arange(first, end)[None], np.array([start]), num_queries)
        return Tile(tokens, slice(first_token + first, first_token + end), mask)

    def _cached(
        self,
        rows: list[int],
        tokens: torch.Tensor | slice,
        starts: NDArray[Any],
        num_queries: int,
    ) -> Tile:
        """Describe queries over the cache; `starts` [N] are the positions of each row's first."""
        firsts = np.maximum(0, starts - self.window + 1)
        lasts = starts + num_queries - 1
        positions = firsts[:, None] + np.arange((lasts - firsts).max() + 1)
        mask = self._mask(positions, starts, num_queries)
        return Tile(tokens, self._places(rows, np.minimum(positions, lasts[:, None])), mask)

    def _places(self, rows: list[int], positions: NDArray[Any]) -> torch.Tensor:
        """Find `positions` [N, M] of the rows in the cache, once for each head."""
        block_size, num_kv_heads = self.cache.block_size, self.cache.num_kv_heads
        row_index = self._to_device(np.array(rows)[:, None])
        blocks = self.batch.block_tables[row_index, self._to_device(positions // block_size)]
        places = blocks.long() * (num_kv_heads * block_size)
        places += self._to_device(positions % block_size)
        heads = torch.arange(num_kv_heads, device=places.device)[:, None] * block_size
        return (places[:, None] + heads).flatten()

    def _mask(self, positions: NDArray[Any], starts: NDArray[Any], num_queries: int) -> torch.Tensor:
        """Let queries at starts[n] + 0, 1, … see `positions` [N, M]."""
        queries = (starts[:, None] + np.arange(num_queries))[:, :, None]
        keys = positions[:, None, :]
        return self._to_device((keys <= queries) & (keys > queries - self.window))

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.cache.device)


# --- attending -------------------------------------------------------------------------------------


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attend densely.

    :param q: [N · C, H, D].
    :param k: [N, G, M, D].
    :param v: [N, G, M, D].
    :param mask: [N, C, M] bool; each query sees something.
    :return: [N · C, H, D].
    """
    num_rows, num_queries, _ = mask.shape
    q = q.view(num_rows, num_queries, spec.num_kv_heads, -1, spec.head_dim)
    q = q.permute(0, 2, 3, 1, 4)  # [N, G, H / G, C, D]
    attention = _attend_fused if spec.softcap is None else _attend_softcapped
    out = attention(q, k, v, mask, spec)
    return out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)


def _attend_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    if q.shape[3] == 1:  # the heads of a group take the place of the queries: each key is read once
        out = scaled_dot_product_attention(
            q.squeeze(3), k, v, attn_mask=mask.unsqueeze(1), scale=spec.scale
        )
        return out.unsqueeze(3)
    shape = (-1, q.shape[2], -1, -1)
    k, v = (x[0].unsqueeze(1).expand(shape) for x in (k, v))
    # A mask of three dimensions would be legal too, but rules out the fused kernel.
    out = scaled_dot_product_attention(q[0], k, v, attn_mask=mask[0], scale=spec.scale)
    return out.unsqueeze(0)


def _attend_softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    softcap = spec.softcap or 1.0
    scores = q.to(wide).flatten(2, 3) @ k.to(wide).transpose(2, 3)
    scores = softcap * torch.tanh(scores * (spec.scale / softcap))
    scores = scores.view(*q.shape[:4], -1).masked_fill(~mask[:, None, None], -torch.inf)
    out = torch.softmax(scores, dim=-1).flatten(2, 3) @ v.to(wide)
    return out.view(q.shape).to(q.dtype)
